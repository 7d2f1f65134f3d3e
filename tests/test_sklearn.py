"""The estimator: scikit-learn's own checks, its tools around it, and images, paths and tables in, a row each out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from conftest import TINY_ARGS, blobs
from PIL import Image
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor, nn

from barlow import Config
from barlow.errors import Stopped, UserError
from barlow.sklearn import BarlowTwinsEncoder
from barlow.tables import Corrupted, TableEncoder, moments

Array = np.ndarray[Any, np.dtype[Any]]
QUICK = {"steps": 2, "hidden": (8,), "projector": (8, 8), "random_state": 1}
SMALL = Config(encoder="resnetv2_18", encoder_args=TINY_ARGS, image_size=32, projector=(8, 8), precision="float32")


def quick(**changes: Any) -> BarlowTwinsEncoder:
    return BarlowTwinsEncoder(**{**QUICK, **changes})


def of_images(**changes: Any) -> BarlowTwinsEncoder:
    return BarlowTwinsEncoder(**{"config": SMALL, "steps": 2, "random_state": 1, **changes})


def table(rows: int = 60, columns: int = 5) -> Array:
    return np.random.default_rng(0).normal(3, 2, (rows, columns)) * [1, 10, 0.1, 1, 100][:columns]


class Small(nn.Module):
    """Any module: rows or images → (n, 6)."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x.flatten(1)))


def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=generator)


@parametrize_with_checks([BarlowTwinsEncoder(steps=2, hidden=(8,), projector=(8, 8))])
def test_scikit_learns_own_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


def test_constructing_is_cheap() -> None:
    code = "import sys; from barlow.sklearn import BarlowTwinsEncoder as B; B(steps=3); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("X", [table(), blobs(40), list(blobs(40)[..., None])], ids=["table", "array", "list"])
def test_a_fitted_estimator_outlives_joblib(X: Any, tmp_path: Path) -> None:
    """Plain arrays and JSON: no torch object is in the file, and the output is equal to the bit."""
    fitted = (quick() if isinstance(X, np.ndarray) and X.ndim == 2 else of_images()).fit(X)
    joblib.dump(fitted, tmp_path / "fitted.joblib")
    assert b"torch" not in (tmp_path / "fitted.joblib").read_bytes()
    for mode in (None, "r"):
        again = joblib.load(tmp_path / "fitted.joblib", mmap_mode=mode)
        assert np.array_equal(again.transform(X), fitted.transform(X))
    one = fitted.transform(X[7:8])
    assert np.allclose(one, fitted.transform(X)[7:8], atol=1e-5)


def test_own_module_and_views(tmp_path: Path) -> None:
    """Copied, found again by joblib through the module itself; the views get standardised rows."""
    X, net = table(), Small(5)
    before = net.linear.weight.clone()
    fitted = quick(encoder=net, views=(noisy, noisy)).fit(X)
    assert torch.equal(net.linear.weight, before)
    joblib.dump(fitted, tmp_path / "fitted.joblib")
    made = joblib.load(tmp_path / "fitted.joblib").transform(X)
    assert made.shape == (60, 6)
    assert np.array_equal(made, fitted.transform(X))
    images = of_images(encoder=Small(24 * 24), config=SMALL.replace(encoder=None, encoder_args=None, image_size=24))
    assert images.fit_transform(blobs(40)).shape == (40, 6)


def test_transform_is_that_of_the_trained_network() -> None:
    X = table()
    fitted = quick().fit(X)
    model = TableEncoder(5, (8,)).double().eval()
    model.load_state_dict({name: torch.tensor(array) for name, array in fitted.weights_.items()})
    rows = torch.from_numpy((X - X.mean(0)) / X.std(0))
    assert np.allclose(fitted.transform(X), model(rows).detach().numpy())
    assert not np.allclose(fitted.transform(X), quick(random_state=2).fit(X).transform(X))
    torch.manual_seed(5)  # whatever the state of torch, random_state decides
    assert np.array_equal(fitted.transform(X), quick().fit(X).transform(X))


def test_only_a_fit_changes_what_is_fitted() -> None:
    fitted = quick().fit(table())
    made = fitted.transform(table())
    assert np.array_equal(fitted.set_params(hidden=(4,), corruption=0.9).transform(table()), made)
    with pytest.raises(UserError, match="not the module that was fitted"):
        fitted.set_params(encoder=Small(5)).transform(table())
    with pytest.raises(UserError, match="corruption = 0"):
        fitted.set_params(encoder=None, corruption=0).fit(table())
    with pytest.raises(NotFittedError):
        fitted.transform(table())
    images = fitted.set_params(corruption=0.3, config=SMALL).fit(blobs(40))
    assert not hasattr(images, "n_features_in_")


def test_a_fit_that_is_stopped_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: advice to continue a run whose temporary folder is gone."""
    for code, kind in ((130, KeyboardInterrupt), (143, Stopped)):

        def stopped(*given: Any, code: int = code, **more: Any) -> None:
            raise Stopped("continue with …", code)

        monkeypatch.setattr("barlow.run.pretrain", stopped)
        with pytest.raises(kind) as raised:
            quick().fit(table())
        assert "continue" not in str(raised.value)


def test_paths_keep_their_order_and_their_doubles(tmp_path: Path) -> None:
    paths = []
    for k, one in enumerate(blobs(30)):
        Image.fromarray(one).save(tmp_path / f"{(k * 7) % 30}.png")
        paths.append(str(tmp_path / f"{(k * 7) % 30}.png"))
    fitted = of_images(config=SMALL.replace(cache=False)).fit(paths)
    made = fitted.transform(np.array([*paths, paths[0]]))
    assert np.allclose(made, fitted.transform(np.concatenate([blobs(30), blobs(30)[:1]])), atol=1e-5)
    assert np.allclose(made[0], made[30], atol=1e-6)
    with pytest.raises(UserError, match=r"gone.png: cannot be read: No such file.*leave it out of X"):
        fitted.transform([*paths, tmp_path / "gone.png"])


def test_in_a_pipeline_and_a_grid_search() -> None:
    """Also: nothing of a search but the estimator's words is needed to run it, and torch's own draws are left alone."""
    X = table()
    y = X[:, 0] > 3
    grid = {"barlowtwinsencoder__corruption": np.float32([0.2, 0.6]), "barlowtwinsencoder__lambda_": [None, 0.1]}
    torch.manual_seed(5)
    search = GridSearchCV(make_pipeline(quick(), LogisticRegression()), grid, cv=2, error_score="raise").fit(X, y)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert search.predict(X).shape == (60,)
    images = GridSearchCV(make_pipeline(of_images(), LogisticRegression()), {"barlowtwinsencoder__lambda_": [0.1]},
                          cv=2, error_score="raise")  # fmt: skip
    assert images.fit(blobs(40), np.arange(40) % 2).predict(blobs(40)).shape == (40,)


def test_fits_in_threads_are_those_of_their_seeds() -> None:
    """Kills: torch's generators shared by fits side by side."""
    X, often = table(), sys.getswitchinterval()
    alone = [quick(random_state=seed, hidden=(64, 64)).fit(X).transform(X) for seed in range(6)]
    try:
        sys.setswitchinterval(1e-5)
        fits = (joblib.delayed(quick(random_state=seed, hidden=(64, 64)).fit)(X) for seed in range(6))
        beside = joblib.Parallel(n_jobs=6, backend="threading")(fits)
    finally:
        sys.setswitchinterval(often)
    for fitted, made in zip(beside, alone, strict=True):
        np.testing.assert_array_equal(fitted.transform(X), made)


def test_images_are_transformed_the_same_in_any_company(capfd: pytest.CaptureFixture[str]) -> None:
    fitted, deep = of_images().fit(blobs(40)), blobs(8).astype(np.uint16) * 4
    deep[4:] *= 8
    assert np.allclose(fitted.transform(deep)[:4], fitted.transform(deep[:4]), atol=1e-5)
    assert "of these 16 bits the full range is taken" in capfd.readouterr().err
    for X in (blobs(4) / 255 * 2, list(blobs(4) / 255 * 2)):
        with pytest.raises(UserError, match="real numbers must lie in 0 to 1"):
            fitted.transform(X)


def test_clone_and_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Words given by name win over ``config``; ``out`` keeps the run, and says what it did where asked."""
    config = Config(optimizer="muon", epochs=3, lambda_=0.5)
    kept = clone(quick(config=config, out=tmp_path / "run")).fit(table())
    assert capfd.readouterr() == ("", "")
    text = (tmp_path / "run" / "config.toml").read_text()
    for line in ('optimizer = "muon"', "steps = 2", "lambda = 0.5", "seed = 1", 'views = "python:barlow.tables.Corr'):
        assert line in text
    assert (tmp_path / "run" / "report.html").is_file()
    assert np.array_equal(kept.transform(table()), quick(config=config).fit(table()).transform(table()))
    with pytest.raises(UserError, match="already holds a run"):
        kept.fit(table())
    quick(verbose=True).fit(table())
    assert "60 samples" in capfd.readouterr().err


def test_names_of_the_features() -> None:
    fitted = quick().fit(table())
    assert list(fitted.get_feature_names_out()) == [f"barlowtwinsencoder{k}" for k in range(8)]


def test_pandas_in_and_out() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(table(), columns=list("abcde"), index=range(100, 160))
    fitted = quick().set_output(transform="pandas").fit(frame)
    made = fitted.transform(frame)
    assert list(made.columns) == [f"barlowtwinsencoder{k}" for k in range(8)]
    assert list(made.index) == list(range(100, 160))
    assert list(fitted.feature_names_in_) == list("abcde")
    with pytest.raises(ValueError, match="feature names should match"):
        fitted.transform(frame[list("edcba")])
    assert of_images().set_output(transform="pandas").fit_transform(blobs(40)).shape == (40, 16)


@pytest.mark.parametrize(("estimator", "X", "sentence"), [
    (quick(), table(1), "1 sample"), (quick(), table(3), "minimum of 4"), (quick(), np.full((9, 2), np.nan), "NaN"),
    (quick(), np.array([["a", 1.0]] * 9, object), "could not convert string"),
    (quick(), sparse.csr_array(np.eye(9)), "toarray"), (quick(), [], "0 sample|empty|[Ee]xpected 2D"),
    (quick(), "folder", "is one path"), (quick(), np.arange(9.0), "Expected 2D"),
    (quick(corruption=0), table(), "corruption = 0"), (quick(corruption=2), table(), "corruption = 2"),
    (quick(hidden=()), table(), "hidden"), (quick(hidden=8), table(), "hidden"),
    (quick(hidden=np.array(8)), table(), "hidden"),
    (quick(encoder="resnet18"), table(), "is for images"), (quick(views="small"), table(), "is for images"),
    (quick(image_size=32), table(), "image_size is for images"), (quick(steps=0), table(), "steps = 0"),
    (quick(batch_size=64), table(), "batch_size = 64 is larger"), (quick(random_state="x"), table(), "seed"),
    (quick(random_state=-1), table(), "seed = -1"), (quick(encoder=3), table(), "encoder is a int"),
    (quick(encoder=Small(3)), table(), "cannot take"), (quick(config={"lr": 1}), table(), "config is a dict"),
    (quick(steps="x"), table(), "steps = 'x' is not a whole"), (quick(corruption="x"), table(), "corruption = x"),
    (quick(projector=8), table(), "projector = 8"), (quick(hidden=(8.5,)), table(), "hidden"),
    (quick(views=noisy), table(), "one view"), (quick(config=Config(seed=3)), table(), "random_state is the seed"),
    (quick(config=Config(devices=2)), table(), "one device"), (of_images(), ["a.png", blobs(1)[0]], "holds a ndarray"),
    (quick(), np.full((9, 2), 1e308), "too large"),
    (of_images(), ["gone.png"] * 9, "none of the 9 images"), (of_images(encoder="nothing"), blobs(30), "no encoder"),
    (of_images(), np.full((9, 8, 8), np.nan), "NaN|finite"), (of_images(), blobs(3), "leave 1 to train on"),
])  # fmt: skip
def test_what_cannot_be_fitted_is_said_in_a_sentence(estimator: Any, X: Any, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        estimator.fit(X)


def test_what_cannot_be_transformed_is_said_in_a_sentence() -> None:
    with pytest.raises(NotFittedError):
        quick(lambda_=0.1).transform(table())
    rows, images = quick().fit(table()), of_images().fit(blobs(40))
    for fitted, X, sentence in (
        (rows, table(columns=4), "4 features, but BarlowTwinsEncoder is expecting 5"),
        (rows, blobs(3), "an array of images, and this encoder was fitted on a table"),
        (rows, sparse.csr_array(table()), "toarray"),
        (rows, np.full((2, 5), np.inf), "infinity"),
        (images, table(), "a table, and this encoder was fitted on an array of images"),
        (images, np.zeros((3, 16, 16, 5), np.uint8), "5 channels"),
    ):
        with pytest.raises((ValueError, TypeError), match=sentence):
            fitted.transform(X)


@pytest.mark.parametrize("scale", [1e300, 1e-300, 1.0])
def test_columns_of_any_size_are_standardised(scale: float) -> None:
    """Kills: squares that leave the range, after which every row is the same."""
    X = table()
    mean, deviation = moments(X * scale)
    assert np.allclose(mean / scale, X.mean(0))
    assert np.allclose(deviation / scale, X.std(0))
    assert moments(np.full((9, 1), 0.1) + 1e6)[1] == 1


def test_numbers_of_numpy_are_numbers() -> None:
    quick(steps=np.int64(2), lambda_=np.float32(0.1), hidden=(np.int64(8),), random_state=np.int64(3)).fit(table())
    made = quick(hidden=np.array([16, 8])).fit_transform(table())
    assert np.array_equal(made, quick(hidden=(16, 8)).fit_transform(table()))
    assert np.array_equal(made, clone(quick(hidden=np.array([16, 8]))).fit_transform(table()))


def test_corrupted_values_come_from_their_own_column() -> None:
    """Kills: a view that mixes columns, one that takes whole rows, a share that is not kept."""
    rows = torch.arange(400.0).reshape(100, 4)
    made = Corrupted(rows, 0.3)(rows, torch.Generator().manual_seed(0))
    assert bool((made % 4 == rows % 4).all())
    changed = made != rows
    assert 0.2 < float(changed.float().mean()) < 0.4
    assert int(changed.all(1).sum()) < 10
    sources = Corrupted(rows, 1.0)(rows, torch.Generator().manual_seed(0)) // 4
    assert float((sources[:, 0] != sources[:, 1]).float().mean()) > 0.9
    assert torch.equal(made, Corrupted(rows, 0.3)(rows, torch.Generator().manual_seed(0)))
