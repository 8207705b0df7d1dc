"""Post-hoc self-explanation of CNNs: the code two notebooks share, or that needs a test.

A module, a notebook and a section of the paper share a word:

=================  ==========================================================
``paths``          where everything lies
``store``          atomic artefacts: safetensors, JSON, CSV
``parameters``     checks a notebook's parameters cell
``hardware``       device, precision, seeds
``datasets``       MNIST, STL-10, CUB-200, the embedded digits, your folder
``backbones``      blocks, average pool, linear classifier (eq. 1, 2, 6)
``architectures``  the network to train, by name
``training``       the KMEx recipe, resumable
``activations``    block outputs x(b) and embeddings z of a data set
``networks``       any network by name or module, as blocks; Theorem 1 for each
``composite``      q(b:) (eq. 7, 8), materialised and as an operator
``kmeans``         class-wise k-means on either
``explainers``     h, sim, proj (eq. 3): CNN, KMEx, B4 ... B1234, ProtoPNet
``protopnet``      the baseline: its network, losses, schedule and push
``attribution``    eq. 11 and its segment-wise averages
``measures``       accuracy and cosine alignment (Tables 1 and 2)
``tables``         the published numbers beside ours
``runs``           what one training run leaves behind
``figures``        Figures 1 and 2
``images``         your own folder: reading, labels, split
``explained``      what explaining a folder gives: prototypes, maps, panels
``explorer``       Figure 1 to play with in JupyterLab
``report``         one HTML file to send
``export``         maps and tables of a whole folder
``posthoc``        your own network and images in a few lines; from the shell
``batch``          runs every notebook over data sets and seeds
=================  ==========================================================
"""
