"""Jobs of the search: keep the index of a session or a tree, and find pictures in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handlers.context import JobContext, JobResult, Stopping
from handlers.crop.decode import PIXEL_LIMIT, OpenPicture, SourceFile, read_source
from handlers.models import registry
from handlers.search.find import Matrix, nearest, pairs, to_bytes
from handlers.search.store import Picture, Store, Twins
from handlers.search.walk import pictures_of
from sessions.files import sha256_of
from sessions.refusal import Refusal

if TYPE_CHECKING:
    from handlers.search.model import Embedder

BATCH = 16
_LONG_SIDE = 768
_MOST = 512
"""Pictures that one job looks at, so that a large session lets captions and trainings pass in between."""
NEAR = 0.97
"""The cosine from which two pictures of a session are called nearly the same. High on purpose: pictures of one person
in several poses are alike, too, and these are wanted."""
_MOST_COMPARED = 5000


class EmbedHandler:
    """Keeps the index of a session. The model stays loaded while the worker lives."""

    def __init__(self) -> None:
        self._warm = _Warm()

    def run(self, context: JobContext) -> JobResult:
        """Bring the index of one session up to date.

        The payload: ``index`` (folder), ``search`` (model's name), ``models``, ``root``, ``scope`` (the session's
        folder in the tree), ``pictures`` [{path, size, mtime_ns, sha256}], ``digest``, ``pixel_limit``. The fact
        ``left`` says how many pictures the next job has to look at; ``digest`` is noted once there are none.

        Raises:
            Waiting: the model is not on this machine.
            Stopping: the daemon stops; what was looked at is kept.
        """
        payload = context.payload
        model, store = self._warm.store(context)
        try:
            asked = [Picture(**found) for found in payload["pictures"]]
            tree = Tree(Path(payload["root"]), store, lambda: self._warm.embedder(model, context))
            pictures, left = tree.look(context, asked, _MOST)
            if not left:
                twins = tree.twins(pictures)
                store.replace_scope(str(payload["scope"]), pictures, str(payload["digest"]), twins)
            return JobResult({"pictures": len(pictures), "left": left, "search": model.name})
        finally:
            store.close()


class SearchHandler:
    """Finds pictures of a tree by words or by another picture, without a daemon."""

    def __init__(self) -> None:
        self._warm = _Warm()

    def run(self, context: JobContext) -> JobResult:
        """Bring the index of the whole tree up to date, then ask it.

        The payload: ``index``, ``search``, ``models``, ``root``, ``ignore``, ``query`` (words) or ``like`` (a
        picture), ``count``. The fact ``found``: [{path, score}], the nearest first.

        Raises:
            Refusal: the picture that is asked for cannot be read.
            Waiting: the model is not on this machine.
        """
        payload = context.payload
        model, store = self._warm.store(context)
        try:
            root = Path(payload["root"])
            tree = Tree(root, store, lambda: self._warm.embedder(model, context))
            like = Path(payload["like"]) if payload.get("like") else None
            source = read_source(like) if like else None  # a refusal comes before the long work
            pictures, _left = tree.look(context, pictures_of(root, payload.get("ignore") or ()))
            store.replace_all(pictures)
            query = tree.vector_of(source) if source else tree.embedder().texts([str(payload["query"])])[0]
            file, rows = store.rows()
            if like is not None:
                rows = [(path, row) for path, row in rows if root / path != like]
            scores = Matrix(file, store.width).cosines(query, [row for _path, row in rows])
            found = [
                {"path": rows[place][0], "score": round(float(scores[place]), 4)}
                for place in nearest(scores, int(payload["count"]))
            ]
            return JobResult({"found": found, "pictures": len(rows), "search": model.name})
        finally:
            store.close()


class _Warm:
    """The model of a worker, loaded when it is first needed: for a tree that did not change, only for words."""

    def __init__(self) -> None:
        self._loaded: tuple[Path, str, Embedder] | None = None

    def store(self, context: JobContext) -> tuple[registry.Model, Store]:
        """The model that is meant, and the index that belongs to it."""
        models = context.payload.get("models")
        folder = Path(models) if models else None
        model = registry.find(str(context.payload["search"]), "search", folder, context.cache)
        name = f"{model.name} {model.path.name} {model.bytes}"
        return model, Store(Path(context.payload["index"]), name, width_of(model.path))

    def embedder(self, model: registry.Model, context: JobContext) -> Embedder:
        """The model, loaded."""
        from handlers.search.model import Embedder

        if self._loaded is None or self._loaded[:2] != (model.path, context.device):
            self._loaded = model.path, context.device, Embedder.load(model.path, context.device)
        return self._loaded[2]


@dataclass(frozen=True)
class Tree:
    """Pictures and the index that knows them.

    Attributes:
        root: the tree.
        store: its index.
        embedder: () → the model.
    """

    root: Path
    store: Store
    embedder: Callable[[], Embedder]

    def look(self, context: JobContext, asked: Sequence[Picture], most: int | None = None) -> tuple[list[Picture], int]:
        """Look at those pictures whose content was never looked at.

        Args:
            context: of the job.
            asked: the pictures; those without a hash that are not known as they are get theirs.
            most: look at so many at most.

        Returns:
            The pictures that are there, with their hashes, and how many are left to look at.

        Raises:
            Stopping: the daemon stops.
        """
        known = self.store.known()
        pictures = [found for picture in asked if (found := self._hashed(picture, known)) is not None]
        paths = {picture.sha256: picture.path for picture in pictures}
        missing = self.store.missing(picture.sha256 for picture in pictures)
        wanted = missing[:most]
        for start in range(0, len(wanted), BATCH):
            if context.is_stopping():
                raise Stopping
            batch = wanted[start : start + BATCH]
            self.store.add(self._vectors({sha256: self.root / paths[sha256] for sha256 in batch}, context.payload))
            context.progress(start + len(batch), len(wanted), "pictures for the search")
        return pictures, len(missing) - len(wanted)

    def _hashed(self, picture: Picture, known: Mapping[str, Picture]) -> Picture | None:
        """The picture with its hash; None where it is gone or cannot be read."""
        if picture.sha256:
            return picture
        before = known.get(picture.path)
        if before and (before.size, before.mtime_ns) == (picture.size, picture.mtime_ns):
            return before
        try:
            return replace(picture, sha256=sha256_of(self.root / picture.path))
        except OSError:
            return None

    def _vectors(self, files: Mapping[str, Path], payload: Mapping[str, Any]) -> dict[str, bytes | None]:
        """Vectors of contents; None for what is no picture. A file that changed or went meanwhile is left out."""
        images: dict[str, Any] = {}
        refused: dict[str, bytes | None] = {}
        for sha256, path in files.items():
            try:
                source = read_source(path)
                if hashlib.sha256(source.content).hexdigest() == sha256:
                    images[sha256] = decoded(source, int(payload.get("pixel_limit") or PIXEL_LIMIT))
            except (Refusal, MemoryError):
                refused[sha256] = None
            except OSError:
                continue
        if not images:
            return refused
        vectors = self.embedder().pictures(list(images.values()))
        return refused | {sha256: to_bytes(vector) for sha256, vector in zip(images, vectors, strict=True)}

    def vector_of(self, source: SourceFile) -> Any:
        """The vector of a file's content: out of the index where it knows it.

        Raises:
            Refusal: it is no picture.
        """
        file, rows = self.store.rows_of([hashlib.sha256(source.content).hexdigest()])
        if rows:
            return Matrix(file, self.store.width).vectors(list(rows.values()))[0]
        return self.embedder().pictures([decoded(source)])[0]

    def twins(self, pictures: Sequence[Picture]) -> list[Twins]:
        """The pictures among these that look the same; none said of sets too large to compare, or of the same file."""
        paths = {picture.sha256: picture.path for picture in reversed(pictures)}
        file, rows = self.store.rows_of(paths)
        if not 1 < len(rows) <= _MOST_COMPARED:
            return []
        vectors = Matrix(file, self.store.width).vectors(list(rows.values()))
        names = [paths[sha256] for sha256 in rows]
        return [
            Twins(min(names[one], names[other]), max(names[one], names[other]), cosine)
            for one, other, cosine in pairs(vectors, NEAR)
        ]


def decoded(source: SourceFile, pixel_limit: int = PIXEL_LIMIT) -> Any:
    """A picture of a file, upright, no larger than a model needs.

    Raises:
        Refusal: it is none, or damaged.
    """
    opened = OpenPicture(source, pixel_limit)
    return opened.decode(min(1.0, _LONG_SIDE / opened.longer_side)).image


def width_of(folder: Path) -> int:
    """Numbers of the embeddings of a model, from its configuration alone."""
    from transformers import AutoConfig

    configuration = AutoConfig.from_pretrained(folder, local_files_only=True)
    if configuration.model_type == "clip":
        return int(configuration.projection_dim)
    return int(configuration.vision_config.hidden_size)
