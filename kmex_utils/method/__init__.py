"""The method, beside the paper: composite (eq. 7-8), k-means, explainers (eq. 3), attribution (eq. 11), measures."""
