"""The command line: one parser, and a command's room is opened only when it is called.

``--help`` and ``status`` answer in a blink: nothing heavier than argparse is imported here (a test holds it).
Exit codes: 0 done, 1 something failed, 2 wrong use, 78 configuration.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sessions import __version__

DONE, FAILED, USAGE, CONFIGURATION = 0, 1, 2, 78

_DESCRIPTION = "Drop pictures and a train.yaml into a folder. Get a model, already in your WebUI."
_EPILOG = """\
A first minute:       fastsd demo
Your own pictures:    fastsd init ~/Fast-Dreambooth, then fastsd up ~/Fast-Dreambooth
Something is wrong:   fastsd doctor, fastsd status, fastsd logs
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints end with what helps."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(USAGE, f"{self.prog}: {message}\nSee: {self.prog} --help\n")


def _command(
    commands: argparse._SubParsersAction[_Parser],
    name: str,
    room: str,
    text: str,
    *,
    json: bool = True,
) -> _Parser:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(room=room)
    if json:
        parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout, for programs")
    return parser


def _root(parser: _Parser, *, needed: bool = False) -> None:
    text = "the folder tree" if needed else "the folder tree; needed only where several have been watched"
    parser.add_argument("root", type=Path, nargs=None if needed else "?", metavar="ROOT", help=text)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="fastsd",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastsd {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    _add_daemon(commands)
    _add_looks(commands)
    _add_oneoffs(commands)
    _add_lora(commands)
    _add_models(commands)
    _add_service(commands)
    return parser


def _add_daemon(commands: argparse._SubParsersAction[_Parser]) -> None:
    up = _command(commands, "up", "up:up", "watch a tree and do what is dropped there, in the foreground", json=False)
    up.add_argument("root", type=Path, nargs="?", default=Path(), metavar="ROOT", help="the tree (default: here)")
    up.add_argument("--once", action="store_true", help="do what is there, then exit: 0, or 1 if anything failed")
    up.add_argument("--config", type=Path, metavar="F", help="settings file (default: ROOT/fastsd.yaml)")
    demo = _command(commands, "demo", "demo:demo", "the whole chain on the built-in miniature models", json=False)
    demo.add_argument("folder", type=Path, nargs="?", default=Path("demo"), metavar="DIR", help="default: demo")
    init = _command(commands, "init", "init:init", "make a tree: its folders, fastsd.yaml, a first session", json=False)
    _root(init, needed=True)
    _root(_command(commands, "doctor", "doctor:doctor", "check this machine and say what is missing"))


def _add_looks(commands: argparse._SubParsersAction[_Parser]) -> None:
    _root(_command(commands, "status", "look:status", "what is going on"))
    jobs = _command(commands, "jobs", "look:jobs", "the jobs: waiting, running, failed, done")
    _root(jobs)
    jobs.add_argument("--all", action="store_true", help="done ones too")
    for name, text in (
        ("retry", "try failed and refused jobs again: all, or the ones named"),
        ("cancel", "cancel jobs that have not ended"),
    ):
        parser = _command(commands, name, f"look:{name}", text)
        wanted = "*" if name == "retry" else "+"
        parser.add_argument("jobs", type=int, nargs=wanted, metavar="N", help="its number in `fastsd jobs`")
        parser.add_argument("--root", type=Path, metavar="ROOT", help="needed only where several have been watched")
    _root(_command(commands, "pause", "look:pause", "start no new jobs until resume; a training saves and stops"))
    _root(_command(commands, "resume", "look:resume", "go on after pause"))
    logs = _command(commands, "logs", "look:logs", "the daemon's log", json=False)
    _root(logs)
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it grows")
    logs.add_argument("-n", "--lines", type=int, default=50, metavar="N", help="so many lines (default: 50)")


def _add_oneoffs(commands: argparse._SubParsersAction[_Parser]) -> None:
    crop = _command(commands, "crop", "oneoffs:crop", "crop pictures around their subject")
    crop.add_argument("--size", type=int, default=512, metavar="N", help="side in pixels (default: 512)")
    crop.add_argument(
        "--mode", choices=("smart", "centre", "off"), default="smart", help="smart (default), centre, or off: no crop"
    )
    crop.add_argument(
        "--subject",
        choices=("faces", "segment", "centre"),
        help="look for this only (default: faces, else what stands out); segment: ask a salient-object network",
    )
    crop.add_argument(
        "--format",
        choices=("jpg", "webp", "png"),
        default="jpg",
        help="jpg: quality 95 (default); webp, png: without loss",
    )
    crop.add_argument(
        "--ground", choices=("white", "grey", "black"), default="white", help="what transparent pictures lie on"
    )
    caption = _command(commands, "caption", "oneoffs:caption", "caption pictures")
    _add_caption(caption)
    for parser in (crop, caption):
        parser.add_argument("sources", type=Path, nargs="+", metavar="SRC", help="pictures, or folders of pictures")
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    attention = _command(commands, "attention", "attention:attention", "draw where the captioner looked at each word")
    attention.add_argument("image", type=Path, metavar="IMAGE")
    attention.add_argument("--out", type=Path, required=True, metavar="PNG", help="the sheet of heat maps")
    attention.add_argument("--npz", type=Path, metavar="F", help="the raw arrays, too")
    attention.add_argument("--captioner", default="kosmos-2", metavar="NAME", help="kosmos-2, miniature or a name")
    attention.add_argument("--prompt", metavar="TEXT", help="own words instead of a brief caption")
    search = _command(commands, "search", "search:search", "find pictures of a tree by words, or by another picture")
    _root(search, needed=True)
    search.add_argument("query", nargs="?", metavar="QUERY", help='what they show: "a red car"')
    search.add_argument("--like", type=Path, metavar="F", help="a picture that they resemble, in the place of words")
    search.add_argument("--count", type=int, default=10, metavar="N", help="so many, the nearest first (default: 10)")
    search.add_argument("--model", metavar="NAME", help="default: `search:` of fastsd.yaml, else siglip2-base")
    train = _command(commands, "train", "train:train", "crop, caption, train and convert one folder")
    train.add_argument("folder", type=Path, metavar="FOLDER", help="a folder with pictures and perhaps a train.yaml")
    train.add_argument("--base", metavar="NAME", help="the base, where train.yaml names none")
    train.add_argument("--captioner", metavar="NAME", help="the captioner (default: as in fastsd.yaml)")
    convert = _command(
        commands, "convert", "oneoffs:convert", "convert a Diffusers folder into one file, or a file into a folder"
    )
    convert.add_argument("source", type=Path, metavar="SRC")
    convert.add_argument("destination", type=Path, metavar="DST")
    convert.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="the precision (default: as it is)")
    convert.add_argument("--vae", metavar="VAE", help="of a folder: another VAE to put in, or none")
    convert.add_argument("--like", type=Path, metavar="FOLDER", help="of a file: a Diffusers folder of the same shape")
    convert.add_argument("--weights", choices=("trained", "ema"), default="trained", help="of a file: which weights")
    convert.add_argument("--verify", choices=("header", "sample", "all", "forward"), default="sample")
    inspect = _command(commands, "inspect", "oneoffs:inspect", "say what a model file is")
    inspect.add_argument("files", type=Path, nargs="+", metavar="FILE")
    inspect.add_argument("--hash", action="store_true", help="compute SHA-256 and AutoV2 too")


def _add_caption(parser: _Parser) -> None:
    add = parser.add_argument
    add("--captioner", default="kosmos-2", metavar="NAME", help="kosmos-2, miniature or a name")
    add("--mode", choices=("brief", "detailed"), default="brief", help="a sentence or a paragraph (default: brief)")
    add("--prompt", metavar="TEXT", help='own words in the mode\'s place, like "A photo of"')
    add("--ask", action="append", default=[], metavar="QUESTION", help="ask something about each picture")
    add("--ground", action="append", default=[], metavar="PHRASE", help='where it is: "the dog"; may be repeated')
    add("--refer", action="append", default=[], metavar="X0,Y0,X1,Y1", help="what is in this box, in parts of 1")
    add("--prefix", metavar="TEXT", help="words before each line")
    add("--suffix", metavar="TEXT", help="words behind it")
    add("--drop", action="append", default=[], metavar="WORDS", help="leave them out of the line")
    add("--blacklist", action="append", default=[], metavar="WORD", help="the model must not say it")
    add("--instance", metavar="TOKEN", help="name the subject by this token, once")
    add("--class", dest="class_", metavar="NOUN", help="what the subject is")
    add("--concept", choices=("object", "face", "style"), default="object", help="what the token stands for")
    precisions = ("auto", "fp32", "bf16", "fp16", "int8", "4bit")
    add("--precision", choices=precisions, default="auto", help="how the model computes (default: by the machine)")
    add("--features", type=Path, metavar="F", help="write what the model sees to this safetensors file, too")
    add("--check", action="store_true", help="score how well each line fits its picture")


def _add_lora(commands: argparse._SubParsersAction[_Parser]) -> None:
    lora = commands.add_parser("lora", help="LoRAs: convert between layouts, merge into a model, take out of one")
    actions = lora.add_subparsers(metavar="ACTION", required=True, parser_class=_Parser)
    convert = _command(actions, "convert", "lora:convert", "kohya's names (WebUIs) or diffusers' and peft's")
    convert.add_argument("source", type=Path, metavar="SRC", help="a .safetensors file, or a peft folder")
    convert.add_argument("out", type=Path, metavar="DST", help="the .safetensors file to make")
    convert.add_argument("--to", choices=("kohya", "diffusers"), default="kohya", help="default: kohya")
    convert.add_argument("--family", choices=("sd1", "sd2", "sdxl", "flux"), help="where the file does not tell")
    extract = _command(actions, "extract", "lora:extract", "what distinguishes a model from its base, as a LoRA")
    extract.add_argument("source", type=Path, metavar="MODEL", help="a Diffusers folder or one file")
    extract.add_argument("base", type=Path, metavar="BASE", help="what it was trained from")
    extract.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .safetensors file to make")
    extract.add_argument("--rank", type=int, default=16, metavar="N", help="default: 16")
    extract.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp16", help="default: fp16")
    merge = _command(actions, "merge", "lora:merge", "write a model with LoRAs merged into it")
    merge.add_argument("source", type=Path, metavar="BASE", help="a Diffusers folder or one file")
    merge.add_argument("loras", type=Path, nargs="+", metavar="LORA", help="in any layout")
    merge.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to make")
    merge.add_argument(
        "--weight", type=float, action="append", metavar="W", help="one for all, or one each (default 1)"
    )
    merge.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="the precision (default: as it is)")


def _add_models(commands: argparse._SubParsersAction[_Parser]) -> None:
    models = commands.add_parser("models", help="models: list what there is, get what is missing")
    actions = models.add_subparsers(metavar="ACTION", required=True, parser_class=_Parser)
    listing = _command(actions, "list", "models:listing", "bases, captioners and what lies under Models/")
    _root(listing)
    export = _command(actions, "export", "models:export", "write a captioner as ONNX, for onnxruntime")
    export.add_argument("name", metavar="NAME", help="kosmos-2 or another captioner of `models list`")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    export.add_argument("--int8", action="store_true", help="int8 weights: a quarter of the size")
    export.add_argument("--compare", type=Path, nargs="*", default=[], metavar="SRC", help="pictures to compare on")
    promote = _command(actions, "promote", "promote:promote", "make one of a session's models its published one")
    promote.add_argument("target", type=Path, metavar="FOLDER|FILE", help="a session with --step, or a model in it")
    promote.add_argument("--step", type=int, metavar="N", help="the intermediate model of this step of the newest run")
    get = _command(actions, "get", "models:get", "download a model by name or address")
    get.add_argument("name", metavar="NAME", help="a name of `models list`, or an https address of a model file")
    get.add_argument("--root", type=Path, metavar="ROOT", help="put a file from an address under ROOT/Models")


def _add_service(commands: argparse._SubParsersAction[_Parser]) -> None:
    service = commands.add_parser("service", help="run fastsd with systemd")
    actions = service.add_subparsers(metavar="ACTION", required=True, parser_class=_Parser)
    for name, text in (("install", "install and start a systemd unit"), ("uninstall", "stop it and take it away")):
        parser = _command(actions, name, f"service:{name}", text, json=False)
        _root(parser, needed=True)
        parser.add_argument("--system", action="store_true", help="for the whole machine (default: for this user)")
        if name == "install":
            parser.add_argument("--print", action="store_true", dest="show", help="only show the unit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``fastsd``."""
    chosen = build_parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be text in any encoding; they are shown as well as they can be.
        sys.stdout.reconfigure(errors="replace")
    module, function = chosen.room.split(":")
    run: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(f"daemon.commands.{module}"), function)
    try:
        return run(chosen)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): no news for it, and no traceback either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return 130
