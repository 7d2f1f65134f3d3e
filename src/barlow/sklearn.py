"""Barlow Twins as a step of a scikit-learn pipeline: ``BarlowTwinsEncoder``, for images and for plain tables.

Importing this room needs scikit-learn and no torch; torch comes with the first ``fit`` or ``transform``.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from barlow.config import Config, from_mapping, merge, word
from barlow.errors import Stopped, UserError
from barlow.samples import Samples

Kind = Literal["table", "images", "paths"]

LEAST = 4  # samples: two to train on, two held out
CHUNK = 256  # rows a pass
STEPS = 1000  # of a table, unless a length is given
FITTED = ("weights_", "settings_", "kind_", "mean_", "scale_", "n_features_in_", "feature_names_in_")
INSTEAD = {"images": "X holds them", "out": "out is a parameter", "seed": "random_state is the seed",
           "devices": "an estimator trains on one device"}  # fmt: skip
# torch's global generators are one for all threads: fits side by side would draw from, and put back, each other's.
CHANCE = threading.RLock()  # taken anew by a fit within a fit
WORDS = {"table": "a table", "images": "an array of images", "paths": "a list of paths"}


@final
class BarlowTwinsEncoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Features learned without labels, by ``barlow.pretrain`` (Zbontar et al., ICML 2021, arXiv:2103.03230).

    ``X`` is one of three: images, as an array (n, h, w) or (n, h, w, c) or a list of arrays of any sizes; a list of the
    paths of images; a table (n, columns) of finite numbers. Labels are ignored. Features are float32, of tables of the
    type of the table.

    A table is standardised by column, its encoder is a perceptron, and its views are those of SCARF (Bahri et al., ICLR
    2022, arXiv:2106.15147): values replaced by those of other rows in the same column.

    Parameters: what is None is chosen from the data, as pretrain does.
        encoder: A timm model by name (images), or a torch module samples → (n, features). Modules are copied.
        views: A preset by name (images), or two or more ``View`` rows or functions (samples, generator).
        hidden: Of a table: widths of the layers of the encoder; the last is the number of features.
        corruption: Of a table: probability that a view replaces a value, above 0 and up to 1.
        image_size, projector, lambda_, batch_size, epochs, steps: As in ``barlow.Config``; a table is trained on for
            1,000 steps unless a length is given.
        config: A ``barlow.Config`` with any further settings; those above win over it. Images are read in this process
            unless it names workers.
        random_state: The seed, a RandomState, or None for another seed each time, as in scikit-learn.
        out: Run folder to keep, with its report, for one fit: it must hold no run yet. None: a temporary one.
        verbose: Whether choices and progress are printed; the warning of a collapse is in any case.

    Attributes:
        weights_: The trained encoder, name → array; with ``settings_`` (JSON) all that ``transform`` needs.
        settings_: What the encoder is, and what was trained on, as in its config.json.
        kind_: "table", "images" or "paths": what it was fitted on, and is to transform.
        mean_: Of a table: the mean of each column, float64.
        scale_: Of a table: the standard deviation of each column, float64; 1 where it is constant.
        n_features_in_: Of a table: how many columns it has.
        feature_names_in_: Of a table: their names, where they have any.
    """

    def __init__(
        self, encoder: Any = None, *, views: Any = None, hidden: Sequence[int] = (256, 256), corruption: float = 0.3,
        image_size: int | None = None, projector: Sequence[int] | None = None, lambda_: float | None = None,
        batch_size: int | None = None, epochs: float | None = None, steps: int | None = None,
        config: Config | None = None, random_state: Any = None, out: str | Path | None = None, verbose: bool = False,
    ) -> None:  # fmt: skip
        self.encoder = encoder
        self.views = views
        self.hidden = hidden
        self.corruption = corruption
        self.image_size = image_size
        self.projector = projector
        self.lambda_ = lambda_
        self.batch_size = batch_size
        self.epochs = epochs
        self.steps = steps
        self.config = config
        self.random_state = random_state
        self.out = out
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> BarlowTwinsEncoder:
        """Trains on ``X`` and returns itself. Raises ValueError for data or parameters that cannot work, DataError
        where images cannot be read, NumbersError where the loss is not finite."""
        from safetensors.numpy import load_file

        from barlow.encoder import WEIGHTS, encoder_folder, read_config
        from barlow.run import pretrain

        kind = kind_of(X)
        for name in FITTED:  # a fit that fails leaves nothing half new, and images nothing of a table
            self.__dict__.pop(name, None)
        with _folder(self.out) as out, _chance_kept():
            config = self._config(kind, out)
            given = self._table_given(X, config.seed or 0) if kind == "table" else self._images_given(X, kind)
            try:
                run = pretrain(config, **given, quiet=not self.verbose)
            except Stopped as stopped:
                if self.out is not None:
                    raise
                if stopped.exit_code == 130:
                    raise KeyboardInterrupt from None
                raise Stopped("Stopped before the end of the fit; nothing is kept.", stopped.exit_code) from None
            folder = encoder_folder(run)
            self.settings_, self.weights_ = read_config(folder), load_file(folder / WEIGHTS)
        self.kind_ = kind
        self._n_features_out = int(self.settings_["num_features"])
        return self

    def transform(self, X: Any) -> NDArray[Any]:
        """Features (n, features), a row for each of ``X``. Raises ValueError where ``X`` is not as it was at ``fit``,
        or an image cannot be read."""
        check_is_fitted(self)
        kind = kind_of(X)
        if (kind == "table") != (self.kind_ == "table"):
            raise UserError(f"X is {WORDS[kind]}, and this encoder was fitted on {WORDS[self.kind_]}.")
        if kind == "table":
            X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
            rows = (X.astype(np.float64) - self.mean_) / self.scale_
            return self._features(rows).astype(X.dtype, copy=False)
        return self._image_features(list(X) if kind == "paths" else X)

    def _config(self, kind: Kind, out: str) -> Config:
        """All that is given, as one ``Config``."""
        if not isinstance(self.config, Config | None):
            raise UserError(f"config is a {type(self.config).__name__}, not a barlow.Config.")
        for name, instead in INSTEAD.items():
            if getattr(self.config, name, None) is not None:
                raise UserError(f"config holds {name}: leave it out, {instead}.")
        words = ("image_size", "projector", "lambda_", "batch_size", "epochs", "steps")
        given = {word(name): getattr(self, name) for name in words}
        given |= {name: getattr(self, name) for name in ("encoder", "views") if isinstance(getattr(self, name), str)}
        given = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(2**31 - 1)
        below = Config(workers=0)
        if kind == "table":
            below = below.replace(steps=STEPS, optimizer="adamw")
        above = from_mapping(given, type(self).__name__).replace(out=out, seed=int(seed), devices=1)
        return merge(merge(below, self.config or Config()), above)

    def _images_given(self, X: Any, kind: Kind) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in ("encoder", "views") if not isinstance(getattr(self, name), str)}
        return {"images": list(X) if kind == "paths" else X, **given}

    def _table_given(self, X: Any, seed: int) -> dict[str, Any]:
        """What ``pretrain`` takes of a table; keeps what its columns are."""
        import torch

        from barlow.tables import Corrupted, moments

        for name in ("encoder", "views"):
            if isinstance(getattr(self, name), str):
                raise UserError(f"{name} = {getattr(self, name)!r} is for images, and X is a table: leave it out.")
        if not (isinstance(self.corruption, int | float | np.number) and 0 < self.corruption <= 1):
            raise UserError(f"corruption = {self.corruption} is no probability above 0.")
        widths: Any = self.hidden
        widths = widths.tolist() if isinstance(widths, np.ndarray) else widths
        widths = widths if isinstance(widths, list | tuple) else ()
        if not widths or not all(isinstance(width, int | np.integer) and width > 0 for width in widths):
            raise UserError(f"hidden = {self.hidden} are no widths of layers, such as (256, 256).")
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=LEAST)
        self.mean_, self.scale_ = moments(X)
        self._widths = tuple(map(int, widths))
        rows = ((X - self.mean_) / self.scale_).astype(np.float32)
        corrupted = Corrupted(torch.from_numpy(rows), self.corruption)
        torch.manual_seed(seed)
        views = (corrupted, corrupted) if self.views is None else self.views
        return {"images": Samples(rows), "views": views, "encoder": self._network()}

    def _network(self) -> Any:
        """The module of one's own, or that of a table."""
        from barlow.tables import TableEncoder

        return TableEncoder(len(self.mean_), self._widths) if self.encoder is None else copy.deepcopy(self.encoder)

    def _opened(self) -> Any:
        """The trained encoder, built anew from ``settings_`` and ``weights_``."""
        import torch

        from barlow.config import OWN
        from barlow.encoder import rebuild, wrap

        own = self.settings_["architecture"].startswith(OWN)
        with _chance_kept():
            model = self._network() if own else rebuild(self.settings_, Path("settings_"))
        try:
            model.load_state_dict({name: torch.tensor(array) for name, array in self.weights_.items()})
        except (AttributeError, RuntimeError):
            raise UserError("encoder is not the module that was fitted: fit again, or give that one back.") from None
        return wrap(model, self.settings_)

    def _features(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of standardised rows; by the perceptron in double precision: a row's features do not depend on the others."""
        import torch

        kind = torch.float64 if self.encoder is None else torch.float32
        model, all_rows = self._opened().to(kind), torch.from_numpy(rows).to(kind)
        with torch.inference_mode():
            parts = [model(all_rows[at : at + CHUNK]).numpy() for at in range(0, len(rows), CHUNK)]
        return np.concatenate(parts).astype(np.float64)

    def _image_features(self, X: Any) -> NDArray[np.float32]:
        import torch

        from barlow.embedding import on_device, read_for
        from barlow.guard import BadImage
        from barlow.images import open_images
        from barlow.sources import shown

        encoder, made = on_device(self._opened()), []
        images = open_images(X, channels=encoder.channels, value_range=encoder.value_range)
        encoder.check_dtype(images.dtype)
        for row in images.bad.slice(0, 1).to_pylist():
            raise UserError(f"{shown(row['path'])}: {row['status']}; every image needs a row, so leave it out of X.")
        for at in range(0, len(images), CHUNK):
            try:
                batch = [read_for(encoder, images, i) for i in range(at, min(at + CHUNK, len(images)))]
            except BadImage as bad:
                raise UserError(f"An image of X {bad.reason}; every image needs a row, so leave it out.") from None
            with torch.inference_mode():
                made.append(encoder(encoder.normalised(batch)).float().cpu().numpy())
        return np.concatenate(made)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "weights_")  # lambda_ ends like a fitted attribute, and is none

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def kind_of(X: Any) -> Kind:
    """Which of the three ``X`` is; what is neither images nor paths passes for a table, which says what is wrong."""
    if isinstance(X, str | Path):
        raise UserError(
            f"X = {str(X)!r} is one path: give a list of the paths of images, such as list(folder.glob('*.jpg'))."
        )
    dimensions = getattr(X, "ndim", None)
    if dimensions in (3, 4):
        return "images"
    if isinstance(X, list | tuple) or dimensions == 1:
        first = next(iter(X), None)
        if isinstance(first, str | Path):
            odd = next((type(one).__name__ for one in X if not isinstance(one, str | Path)), None)
            if odd:
                raise UserError(f"X is a list of paths that also holds a {odd}: give paths alone, or arrays.")
            return "paths"
        if getattr(first, "ndim", None) in (2, 3):
            return "images"
    return "table"


@contextmanager
def _folder(out: str | Path | None) -> Iterator[str]:
    """The run folder: that of the user, or one that is gone afterwards."""
    if out is not None:
        if (Path(out) / "config.toml").exists():  # pretrain would go on with it, whatever functions its views were
            raise UserError(f"{out} already holds a run, and fit begins anew: give another out, or remove the folder.")
        yield str(out)
        return
    with TemporaryDirectory(prefix="barlow-") as temporary:
        yield str(Path(temporary) / "run")


@contextmanager
def _chance_kept() -> Iterator[None]:
    """torch's global generators for this thread alone, and afterwards as before: an estimator's seed is its own."""
    import torch

    with CHANCE, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
