"""The score against every published row of ten accuracies that could be found."""

import numpy as np
import pytest

from onetrunk.benchmark.decathlon import DOMAINS, E_MAX, points, score

COLUMNS = "imagenet12 aircraft cifar100 daimlerpedcls dtd gtsrb vgg-flowers omniglot svhn ucf101"

# (method, accuracies in per cent in the order of COLUMNS, S as printed, S recomputed from the
# printed accuracies). Read in the results tables of Liu et al., MTAN; Li et al., Universal
# Representations (IJCV 2023); Morgado and Vasconcelos, NetTailor: Scratch, Feature extractor,
# Finetune (NIPS'17), LwF, series of NIPS'17, Parallel RA and SVD, DAN, Piggyback, MTAN, NetTailor,
# MDL, URL, URL + RA. The other rows (Rebuffi et al.; Mancini et al.; Berriel et al.; Guo et al.;
# Bulat et al.; Li and Vasconcelos) were not read in print: that their accuracies give the printed S
# is also the evidence for them, so they test the formula less.
PUBLISHED = (
    ("Scratch", "59.87 57.10 75.73 91.20 37.77 96.55 56.30 88.74 96.63 43.27", 1625, 1627),
    ("Scratch+", "59.67 59.59 76.08 92.45 39.63 96.90 56.66 88.74 96.78 44.17", 1826, 1827),
    ("Feature extractor", "59.67 23.31 63.11 80.33 45.37 68.16 73.69 58.79 43.54 26.80", 544, 545),
    (
        "Finetune (NIPS'17 baseline)",
        "59.87 60.34 82.12 92.82 55.53 97.53 81.41 87.69 96.55 51.20",
        2500,
        2500,
    ),
    (
        "Finetune (CVPR'18 preprocessing)",
        "60.32 60.34 82.12 92.82 55.53 99.42 81.41 89.12 96.55 51.20",
        3096,
        3096,
    ),
    ("LwF", "59.87 61.15 82.23 92.34 58.83 97.57 83.05 88.08 96.10 50.04", 2515, 2517),
    ("BN adapt", "59.87 43.05 78.62 92.07 51.60 95.82 74.14 84.83 94.10 43.51", 1363, 1362),
    (
        "Res. adapt. (series, NIPS'17)",
        "59.67 56.68 81.20 93.88 50.85 97.05 66.24 89.62 96.13 47.45",
        2118,
        2119,
    ),
    (
        "Res. adapt. decay",
        "59.67 61.87 81.20 93.88 57.13 97.57 81.67 89.62 96.13 50.12",
        2621,
        2621,
    ),
    (
        "Res. adapt. finetune all",
        "59.23 63.73 81.31 93.30 57.02 97.47 83.43 89.82 96.17 50.28",
        2643,
        2644,
    ),
    (
        "Res. adapt. dom-pred",
        "59.18 63.52 81.12 93.29 54.93 97.20 82.29 89.82 95.99 50.10",
        2503,
        2503,
    ),
    (
        "Res. adapt. (large)",
        "67.00 67.69 84.69 94.28 59.41 97.43 84.86 89.92 96.59 52.39",
        3131,
        3131,
    ),
    (
        "Series RA (CVPR'18)",
        "60.32 61.87 81.22 93.88 57.13 99.27 81.67 89.62 96.57 50.12",
        3159,
        3158,
    ),
    ("Parallel RA", "60.32 64.21 81.91 94.73 58.83 99.38 84.68 89.21 96.54 50.94", 3412, 3412),
    ("Parallel SVD", "60.32 66.04 81.86 94.23 57.82 99.24 85.74 89.25 96.62 52.50", 3398, 3397),
    ("DAN", "57.74 64.12 80.07 91.30 56.54 98.46 86.05 89.67 96.77 49.38", 2851, 2853),
    ("Piggyback", "57.69 65.29 79.87 96.99 57.45 97.27 79.09 87.63 97.24 47.48", 2838, 2840),
    ("MTAN (WRN)", "63.90 61.81 81.59 91.63 56.44 98.80 81.04 89.83 96.88 50.63", 2941, 2944),
    ("WTPB full (Mancini)", "60.8 52.8 82.0 96.2 58.7 99.2 88.2 89.2 96.8 48.6", 3497, 3495),
    ("WTPB simple", "60.8 51.3 81.9 94.7 59.0 99.1 88.0 89.3 96.5 48.7", None, 3258),
    ("BA2 beta=1.0", "56.9 49.9 78.1 95.5 55.1 99.4 86.1 88.7 96.9 50.2", 3199, 3217),
    ("BA2 beta=0.75", "56.9 47.0 78.4 95.3 55.0 99.2 85.6 88.8 96.8 48.7", 3063, 3065),
    ("BA2 beta=0.5", "56.9 45.7 76.6 95.0 55.2 99.4 83.3 88.9 96.9 46.8", 2999, 2992),
    ("BA2 beta=0.25", "56.9 42.2 71.0 93.4 52.4 99.1 82.0 88.5 96.9 43.9", 2538, 2535),
    ("SpotTune", "60.32 63.91 80.48 96.49 57.13 99.52 85.22 88.84 96.72 52.34", 3612, 3612),
    (
        "SpotTune global-k",
        "60.32 61.57 80.30 95.78 55.80 99.48 85.38 88.05 96.48 51.05",
        3401,
        3397,
    ),
    (
        "Tensor factorisation (Bulat)",
        "61.48 67.36 80.84 93.22 59.10 99.64 88.99 88.91 96.95 47.90",
        3585,
        3588,
    ),
    ("CovNorm", "60.37 69.37 81.34 98.75 59.95 99.14 83.44 87.69 96.55 48.92", 3713, 3714),
    ("NetTailor", "61.42 75.07 81.84 94.68 61.28 99.52 86.53 90.09 96.44 49.54", 3744, 3744),
    (
        "vanilla MDL (joint)",
        "59.30 67.21 79.60 97.08 57.66 97.28 83.88 87.41 96.39 45.76",
        2866,
        2867,
    ),
    (
        "URL (distilled universal)",
        "61.45 74.35 80.45 97.55 59.57 98.24 86.73 89.72 96.95 49.01",
        3626,
        3625,
    ),
    (
        "URL + parallel RA (IJCV'23)",
        "61.97 77.17 82.31 97.58 60.69 98.75 87.28 90.40 97.14 51.89",
        4005,
        4005,
    ),
)
METHODS = [row[0] for row in PUBLISHED]


def accuracies_of(row: str, shift: float = 0.0) -> dict[str, float]:
    """In [0, 1], each moved by `shift` points of per cent."""
    numbers = (min(100.0, max(0.0, float(text) + shift)) / 100 for text in row.split())
    return dict(zip(COLUMNS.split(), numbers, strict=True))


@pytest.mark.parametrize(("row", "recomputed"), [r[1::2] for r in PUBLISHED], ids=METHODS)
def test_every_published_row_gives_its_recomputed_score(row, recomputed):
    assert score(accuracies_of(row)) == pytest.approx(recomputed, abs=1)


@pytest.mark.parametrize(("row", "printed"), [r[1:3] for r in PUBLISHED], ids=METHODS)
def test_every_printed_score_is_explained_by_the_rounding_of_its_accuracies(row, printed):
    if printed is None:
        pytest.skip("no S was printed for this row")
    n_decimals = max(len(text.partition(".")[2]) for text in row.split())
    half = 0.5 * 10**-n_decimals  # S grows with every accuracy, so the ends are its bounds
    # 2: S is printed as a whole number, rounded or cut, and E_max is known to 0.01 points only
    low, high = score(accuracies_of(row, -half)) - 2, score(accuracies_of(row, half)) + 2
    assert low <= printed <= high


def test_the_reference_scores_250_a_domain():
    reference = {name: domain.reference for name, domain in DOMAINS.items()}
    assert list(points(reference).values()) == pytest.approx([250] * 10)


def test_e_max_is_the_challenges():
    printed = (80.26, 79.32, 35.76, 14.36, 88.94, 4.94, 37.18, 24.62, 6.90, 97.60)
    assert [100 * E_MAX[name] for name in COLUMNS.split()] == pytest.approx(printed)


def test_accuracies_may_be_numbers_of_numpy():
    assert points({"svhn": np.float32(1.0)}) == {"svhn": 1000}


def test_a_domain_scores_from_0_to_1000():
    assert points({"svhn": 1.0, "gtsrb": 0.0, "dtd": 1 - E_MAX["dtd"]}) == {
        "svhn": 1000, "gtsrb": 0, "dtd": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("accuracies", "message"),
    [
        (
            {"mnist": 0.9},
            r"'mnist' is no domain of the decathlon. The ten are imagenet12, aircraft",
        ),
        ([("dtd", 0.5), ("dtd", 0.6)], r"'dtd' is there twice. Give every domain once"),
        ({}, r"no domain was asked for. Give one or more of imagenet12"),
        ({"aircraft": 64.21}, r"accuracy 64.21 of 'aircraft'.*in per cent, divide by 100: 0.6421"),
        ({"aircraft": -0.1}, r"an accuracy is a number from 0 to 1\.$"),
        ({"aircraft": float("nan")}, r"accuracy nan of 'aircraft'"),
        ({"aircraft": "0.6"}, r"accuracy '0.6' of 'aircraft'"),
        ({"aircraft": True}, r"accuracy True of 'aircraft'"),
    ],
)
def test_what_is_no_accuracy_of_a_domain_is_refused(accuracies, message):
    with pytest.raises(ValueError, match=message):
        points(accuracies)


def test_a_missing_domain_is_named():
    found = {name: 0.5 for name in DOMAINS if name not in ("svhn", "dtd")}
    with pytest.raises(ValueError, match=r"2 have no accuracy: dtd, svhn.*use points"):
        score(found)
