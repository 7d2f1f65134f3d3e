"""Few labels: features learned without labels, before a linear model with five labels a class.

scikit-learn's digits as a plain table (1,797 rows of 64 numbers). Three times the encoder and PCA are fitted on two
thirds of the rows without their labels; ten times each, a logistic regression learns from five labelled rows a class
and is judged on the last third, which nothing was fitted on. Beside it the same on raw values and on 32 principal
components.

Raw values .860 ± .021, PCA .857 ± .020, Barlow Twins .900 ± .020 (mean ± sd, n = 30), in 69 s of one core of an AMD
EPYC (Zen 4), torch 2.15, scikit-learn 1.9.

    python examples/few_labels.py            # all of it
    python examples/few_labels.py --quick    # a few steps, to see that it runs
"""

import argparse

import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import FunctionTransformer

from barlow.sklearn import BarlowTwinsEncoder

LABELS = 5  # a class


def main(quick: bool = False) -> dict[str, float]:
    """Prints mean ± standard deviation of the accuracy for each kind of features; returns the means."""
    rows, labels = load_digits(return_X_y=True)
    splits, draws, steps = (1, 2, 10) if quick else (3, 10, None)
    found: dict[str, list[float]] = {}
    for seed in range(splits):
        chance = np.random.default_rng(seed)
        mixed = chance.permutation(len(rows))
        train, test = mixed[: len(rows) * 2 // 3], mixed[len(rows) * 2 // 3 :]
        features = {
            "raw values": FunctionTransformer(),
            "PCA": PCA(32, random_state=seed),
            "Barlow Twins": BarlowTwinsEncoder(steps=steps, random_state=seed),
        }
        seen = {name: way.fit(rows[train]).transform(rows) for name, way in features.items()}  # no labels here
        for _ in range(draws):
            few = [chance.choice(train[labels[train] == digit], LABELS, replace=False) for digit in range(10)]
            few = np.concatenate(few)
            for name, values in seen.items():
                model = LogisticRegression(max_iter=5000).fit(values[few], labels[few])
                found.setdefault(name, []).append(model.score(values[test], labels[test]))
    for name, scores in found.items():
        print(f"{name:<14} {np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f}  (n = {len(scores)})")
    return {name: float(np.mean(scores)) for name, scores in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
