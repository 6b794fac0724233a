"""One physical batch out of the data set: gathered, normalised, enlarged to 224×224."""

import numpy as np

from dpsgd import data, models

P = 16


def test_load(request, measure_call):
    folder = request.config.option.data_dir
    name = "cifar100" if folder else "digits"
    dataset = data.load(name, models.get("vit-ti16"), data_dir=folder)
    indices = np.random.default_rng(0).choice(len(dataset.train_targets), P, replace=False)
    measure_call("load", name, f"P={P} 3×224×224", lambda: dataset.batch(indices))
