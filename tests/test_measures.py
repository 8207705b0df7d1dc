import pytest
import torch
import torch.nn.functional as F

from kmex_utils.method.measures import accuracy, cosine_alignment


def data():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(60, 5, generator=generator) + 0.5
    labels = torch.randint(3, (60,), generator=generator)
    p = torch.randn(6, 5, generator=generator)
    return z, labels, p, torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("pairs", ["all", "nearest"])
def test_cosines_by_their_n_times_k_definition(pairs):
    z, labels, p, p_labels = data()
    cosine = F.cosine_similarity(z[:, None], p[None], dim=2)
    distance = torch.cdist(z, p)
    inside, outside = [], []
    for j in range(3):
        columns = (p_labels == j).nonzero().flatten()
        for inside_class, into in ((True, inside), (False, outside)):
            values = []
            for n in ((labels == j) == inside_class).nonzero().flatten().tolist():
                nearest = columns[distance[n, columns].argmin()]
                values += cosine[n, columns].tolist() if pairs == "all" else [cosine[n, nearest].item()]
            into.append(sum(values) / len(values))
    expected = sum(inside) / 3, sum(outside) / 3
    assert cosine_alignment(z, labels, p, p_labels, pairs) == pytest.approx(expected, abs=1e-6)


def test_cosines_ignore_lengths():
    z, labels, p, p_labels = data()
    longer = cosine_alignment(7 * z, labels, 0.01 * p, p_labels)
    assert longer == pytest.approx(cosine_alignment(z, labels, p, p_labels), abs=1e-7)


def test_unknown_pairs_and_a_missing_class_are_refused():
    z, labels, p, p_labels = data()
    with pytest.raises(ValueError, match="pairs must be"):
        cosine_alignment(z, labels, p, p_labels, "some")
    with pytest.raises(ValueError, match="class 2 needs embeddings"):
        cosine_alignment(z[labels < 2], labels[labels < 2], p, p_labels)


def test_accuracy_is_in_percent():
    assert accuracy(torch.tensor([1, 2, 3, 0]), torch.tensor([1, 2, 0, 0])) == 75.0
