"""What pictures call arms, rows and arguments."""

import json
import re

ARMS = {
    "plain": "no dropout",
    "dropout": "dropout",
    "dropout_at_mean_rate": "dropout at Y-Drop's mean rate",
    "jumpout": "Jumpout",
    "ydrop": "Y-Drop",
    "random": "random scores",
    "shuffled": "shuffled scores",
    "inverted": "inverted scores",
}
DATA = {
    "digits": "scikit-learn's digits",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
    "stl10": "STL-10",
    "trec": "TREC",
    "sst2": "SST-2",
    "mr": "MR",
    "tabular": "table",
    "series": "time series",
    "pictures": "pictures",
}
# Of their names, those that are not written in capitals.
NETWORKS = {"transformer": "Transformer", "resnet": "ResNet-18"}
ARGUMENTS = {
    "data.train_fraction": "share of the training images",
    "model.hidden": "hidden layers and their units",
    "ydrop.elasticity": "elasticity",
    "ydrop.every_n_batches": "batches per ranking of the units",
    "ydrop.num_samples": "samples that units are scored on",
}


def arm_in_words(label: str) -> str:
    """Name an arm, and the settings of its own behind its name: "ydrop n_steps=3" is "Y-Drop, n_steps=3"."""
    arm, *settings = label.split()
    return ", ".join([ARMS.get(arm, arm), *settings])


def row_in_words(row: str) -> str:
    """Name data and network: "mnist_fc_1" is "MNIST, FC_1". "tabular_vote", of data alone, is "table, vote"."""
    data, _, network = row.partition("_")
    names_data = data in ("tabular", "series")
    name = network if names_data else NETWORKS.get(network, network.upper())
    return ", ".join([DATA.get(data, data), *([name] if name else [])])


def argument_in_words(name: str) -> str:
    """Name an argument, by its own name where there is no other: "data.batch_size" is "batch size"."""
    return ARGUMENTS.get(name, name.rpartition(".")[2].replace("_", " "))


def value_in_words(name: str, value: str) -> str:
    """Write a value of an argument: widths that are all the same as "2 x 1024", shares in percent, classes by name."""
    if name == "data.train_fraction":
        return f"{100 * float(value):.3g}%"
    try:
        content = json.loads(value)
    except ValueError:
        if not all(part.isidentifier() for part in value.split(".")):
            return value
        # A class, whose name has a line for each of its words.
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "\n", value.rpartition(".")[2])
    if isinstance(content, list) and content and len(set(content)) == 1:
        return f"{len(content)} x {content[0]}"
    return value.replace(",", ",\n") if isinstance(content, list) else value
