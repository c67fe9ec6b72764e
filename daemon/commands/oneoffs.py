"""Commands that do one thing and end: crop, caption, convert, inspect. The daemon's handlers, without a daemon."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from daemon.cli import DONE, FAILED, USAGE
from daemon.commands.roots import complain, print_json
from daemon.state import cache_home
from handlers.models import segments
from sessions import layout
from sessions.ignore import is_ignored_file_name, is_ignored_folder_name

Row = dict[str, Any]
_GROUNDS = {"white": (255, 255, 255), "grey": (128, 128, 128), "black": (0, 0, 0)}


def pictures_in(sources: Iterable[Path]) -> list[Path]:
    """The pictures that are named, and all in the folders that are named, but for what is hidden or not yet whole.

    Links are followed; a folder that links lead to several times is looked at once.
    """
    found: list[Path] = []
    for source in sources:
        if not source.is_dir():
            found.append(source)
            continue
        seen: set[str] = set()
        for parent, folders, names in os.walk(source, followlinks=True):
            real = os.path.realpath(parent)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(folder for folder in folders if not is_ignored_folder_name(folder))
            found += [
                Path(parent, name)
                for name in sorted(names)
                if layout.is_picture_name(name) and not is_ignored_file_name(name)
            ]
    return found


def with_stems(pictures: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Each picture with the stem of its outputs: no two alike."""
    taken: set[str] = set()
    for picture in pictures:
        stem = layout.output_stem(picture.name, taken)
        taken.add(layout.same_stem(stem + "."))
        yield picture, stem


def crop(arguments: argparse.Namespace) -> int:
    """``fastsd crop SRC… --out DIR``."""
    out: Path = arguments.out.absolute()
    if arguments.size < 1:
        return complain(f"--size {arguments.size} is no size", USAGE)
    network = segments.find(None, cache_home(os.environ))
    payloads = [
        {
            "source": os.fspath(picture.absolute()),
            "output": os.fspath(out / f"{stem}.{arguments.format}"),
            "resolution": arguments.size,
            "mode": arguments.mode,
            "wish": {"subject": arguments.subject} if arguments.subject else None,
            "ground": _GROUNDS[arguments.ground],
            "segment": os.fspath(network.path) if network else None,
        }
        for picture, stem in with_stems(pictures_in(arguments.sources))
    ]

    def row(payload: Mapping[str, Any], facts: Mapping[str, Any]) -> Row:
        size = facts.get("written_size") or [None]
        picked = {"box": facts.get("box"), "subject": facts.get("subject"), "size": size[0]}
        told = {"warnings": facts["warnings"]} if facts.get("warnings") else {}
        return {"source": payload["source"], "output": payload["output"], **picked, **told}

    def line(found: Row) -> str:
        return "\n  ".join((f"{found['output']}  ({found['subject']})", *found.get("warnings", ())))

    return run_one_off("crop", payloads, out, arguments, row=row, line=line, workers=os.cpu_count() or 1)


def caption(arguments: argparse.Namespace) -> int:
    """``fastsd caption SRC… --out DIR``."""
    out: Path = arguments.out.absolute()
    missing = missing_captioner(arguments.captioner)
    if missing:
        return complain(missing, FAILED)
    try:
        questions = _questions(arguments)
    except ValueError as error:
        return complain(str(error), USAGE)
    payloads = [
        {
            **{key: getattr(arguments, key) for key in _CAPTION_KEYS},
            "class": arguments.class_,
            "check": bool(arguments.check),
            "questions": questions,
            "source": os.fspath(picture.absolute()),
            "text": os.fspath(out / f"{stem}.txt"),
            "sidecar": os.fspath(out / f"{stem}.json"),
            "preview": os.fspath(out / f"{stem}.jpg"),
            "written": None,
            "captioner": arguments.captioner,
            "models": None,
        }
        for picture, stem in with_stems(pictures_in(arguments.sources))
    ]

    def row(payload: Mapping[str, Any], facts: Mapping[str, Any]) -> Row:
        entities = [{"phrase": entity["phrase"], "box": entity["box"]} for entity in facts.get("entities", [])]
        told = {"caption": facts.get("caption"), "entities": entities, "seconds": facts.get("seconds")}
        more = {key: facts[key] for key in ("answers", "match") if facts.get(key)}
        return {"source": payload["source"], **told, **more}

    def line(found: Row) -> str:
        fit = found.get("match")
        doubt = "" if fit is None else f"  (fit {fit['score']:+.2f}{'' if fit['fits'] else ': does it show that?'})"
        return "\n".join((f"{found['source']}: {found['caption']}{doubt}", *map(_answer, found.get("answers", ()))))

    code = run_one_off("caption", payloads, out, arguments, row=row, line=line)
    if code == USAGE or not arguments.features:
        return code
    return max(code, _features(arguments, [str(payload["source"]) for payload in payloads]))


def _features(arguments: argparse.Namespace, sources: Sequence[str]) -> int:
    """``--features FILE``: what the model saw in all pictures, in one file."""
    output: Path = arguments.features.absolute()
    payload = {
        "source": os.fspath(output),
        "sources": sources,
        "output": os.fspath(output),
        "captioner": arguments.captioner,
        "precision": arguments.precision,
    }

    def row(asked: Mapping[str, Any], facts: Mapping[str, Any]) -> Row:
        return {"features": asked["output"], "shapes": facts.get("shapes"), "left_out": facts.get("left_out")}

    def line(found: Row) -> str:
        return f"{found['features']}  {found['shapes']}"

    return run_one_off("features", [payload], output.parent, arguments, row=row, line=line)


def missing_captioner(name: str) -> str | None:
    """Why a captioner cannot be used on this machine, with what helps; None where it can."""
    from daemon.gates import CaptionGate

    return CaptionGate(name, lambda: None, cache_home(os.environ), lambda: 0.0).reason()


_CAPTION_KEYS = (*("mode", "prompt", "prefix", "suffix", "drop", "blacklist", "instance", "concept", "precision"),)


def _questions(arguments: argparse.Namespace) -> list[Row]:
    """What is asked besides the caption. Raises ``ValueError`` where a box is none."""
    questions: list[Row] = [{"kind": "ask", "text": text} for text in arguments.ask]
    questions += [{"kind": "ground", "text": text} for text in arguments.ground]
    for text in arguments.refer:
        try:
            box = [float(side) for side in text.split(",")]
        except ValueError:
            box = []
        if len(box) != 4:
            message = f"--refer {text}: write left, top, right, bottom in parts of the picture, like 0.1,0.2,0.5,0.9"
            raise ValueError(message)
        questions.append({"kind": "refer", "box": box})
    return questions


def _answer(answer: Row) -> str:
    if answer["kind"] == "ground":
        boxes = [", ".join(f"{side:.2f}" for side in entity["box"]) for entity in answer["entities"]]
        return f"  where is {answer['text']}? {'; '.join(boxes) or 'not found'}"
    asked = answer["text"] or "in " + ", ".join(f"{side:.2f}" for side in answer["box"])
    return f"  {asked}: {answer['answer'] or '(no answer)'}"


def convert(arguments: argparse.Namespace) -> int:
    """``fastsd convert SRC DST``: a Diffusers folder into one file, or a file into a folder."""
    destination: Path = arguments.destination.absolute()
    if not arguments.source.exists():
        return complain(f"{arguments.source}: there is no such file or folder", FAILED)
    payload = {
        "source": os.fspath(arguments.source.absolute()),
        "output": os.fspath(destination),
        "dtype": arguments.dtype,
        "metadata": {},
        "verify": arguments.verify,
        "like": os.fspath(arguments.like.absolute()) if arguments.like else None,
        "weights": arguments.weights,
        "vae": arguments.vae if arguments.vae in (None, "none") else os.fspath(Path(arguments.vae).absolute()),
    }

    def row(asked: Mapping[str, Any], facts: Mapping[str, Any]) -> Row:
        told = {key: facts.get(key) for key in ("family", "prediction", "bytes", "seconds", "verified")}
        return {"source": asked["source"], "output": asked["output"], **told}

    def line(found: Row) -> str:
        return f"{found['output']}  ({found['family']}, {found['bytes']:,} bytes, verified: {found['verified']})"

    return run_one_off("convert", [payload], destination.parent, arguments, row=row, line=line)


def inspect(arguments: argparse.Namespace) -> int:
    """``fastsd inspect FILE…``: header only, in this process."""
    from handlers.models.inspect import inspect as look
    from sessions.files import sha256_of

    problems = False
    for file in arguments.files:
        if not file.exists():
            problems = True
            complain(f"{file}: there is no such file", FAILED)
            continue
        found = look(file).to_json()
        if arguments.hash and file.is_file():
            digest = sha256_of(file)
            found |= {"sha256": digest, "autov2": digest[:10]}
        problems = problems or bool(found["problems"])
        if arguments.json:
            print_json(found)
            continue
        print(found["file"])
        for key, value in found.items():
            if key not in ("file", "problems", "metadata") and value is not None:
                print(f"  {key:<11} {value:,}" if key == "parameters" else f"  {key:<11} {value}")
        for key, value in found["metadata"].items():
            print(f"  {key} = {value}")
        for problem in found["problems"]:
            print(f"  problem     {problem}")
    return FAILED if problems else DONE


def run_one_off(
    kind: str,
    payloads: Sequence[Mapping[str, Any]],
    out: Path,
    arguments: argparse.Namespace,
    *,
    row: Callable[[Mapping[str, Any], Mapping[str, Any]], Row],
    line: Callable[[Row], str],
    workers: int = 1,
) -> int:
    """Run payloads and print a row each, as they end."""
    from daemon.devices import gpu_devices, worker_environment
    from daemon.oneoff import run_payloads
    from daemon.slots import WorkerSettings
    from daemon.terminal import display_for_terminal
    from handlers.kinds import KINDS, ONE_OFF_KINDS

    if not payloads:
        return complain("no pictures were found there", USAGE)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return complain(f"{out} cannot be made: {error.strerror}", FAILED)
    display = display_for_terminal()
    chosen = KINDS.get(kind) or ONE_OFF_KINDS[kind]
    failed = False
    with tempfile.TemporaryDirectory(prefix="fastsd-") as logs:
        settings = WorkerSettings(cache_home(os.environ), Path(logs), worker_environment(os.environ))
        subjects = [Path(str(payload["source"])).name for payload in payloads]
        try:
            for index, outcome in run_payloads(
                chosen,
                payloads,
                settings,
                workers=workers,
                devices=gpu_devices(os.environ) if chosen.lane == "gpu" else (),
                on_progress=lambda number, report: display.show(number, kind, subjects[number], report),
            ):
                display.end(index)
                if outcome.state == "done":
                    found = row(payloads[index], outcome.facts)
                    print_json(found) if arguments.json else print(line(found), flush=True)
                    continue
                failed = True
                refusal = outcome.refusal
                code = refusal.code if refusal else str(outcome.error.get("type") or outcome.state)
                reason = str(refusal) if refusal else outcome.reason or str(outcome.error.get("message") or "stopped")
                if arguments.json:
                    print_json({"source": payloads[index]["source"], "error": code, "reason": reason})
                else:
                    print(f"fastsd: {payloads[index]['source']}: {reason}", file=sys.stderr)
        finally:
            display.close()
    return FAILED if failed else DONE
