"""Talk to a model in the terminal: a run folder, a Hugging Face or PEFT folder, or a nanoGPT ckpt.pt.

    orchestrate chat RUN [--checkpoint latest|best|NAME] [--system TEXT] [--temperature --top_p --max_new_tokens --seed]
    echo "What is 2 + 2?" | orchestrate chat RUN

The model's chat template is used; one that has none goes on with the text. Ctrl-C ends an answer, and at the prompt the
chat, as Ctrl-D does. A line that ends with a backslash goes on in the next one; so does everything between two lines of
three double quotes. A line that begins with / is a command (/help), one that begins with // a message. Without a
terminal each line of standard input is a message or a command, and only answers go to standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from orchestrate.model.generate import Choice
from orchestrate.tools.main import called, script
from orchestrate.tools.sample import number_problems
from orchestrate.training.run.device import DTYPES
from orchestrate.training.session.sampling import placed
from orchestrate.training.session.stopping import SignalWatch
from orchestrate.training.session.talking import Talk, open_talker
from orchestrate.training.settings.errors import Refused, refusing
from orchestrate.training.settings.values import nearest, shown

BLOCK = '"""'
HELP = {
    "/reset": "forget the conversation, but not the system prompt",
    "/system TEXT": "what the conversation begins with; without TEXT nothing",
    "/retry": "another answer instead of the last one",
    "/temperature X": "0: always the likeliest token; without X what it is",
    "/top_p X": "draw among the fewest likeliest tokens that have this probability together",
    "/save FILE": "add the conversation to a file of JSON lines, as data/chat/prepare.py reads it",
    "/load FILE": "go on with the last conversation of such a file",
    "/help": "these lines",
    "/quit": "end, as Ctrl-D does",
}
# What would drive a terminal, or turn the direction of what is read.
_DRIVES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """A text as a terminal may show it: control characters but newlines and tabs as \\x1b and the like."""
    return _DRIVES.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def read_message(line: Callable[[str], str]) -> tuple[str, bool]:
    """What a person says next, and whether it stood between lines of three quotes. Raises EOFError at the end.

    Args:
        line: reads a line, without its end, behind this prompt; raises EOFError.
    """
    lines = [line("> ")]
    block = lines[0].strip() == BLOCK
    with contextlib.suppress(EOFError):  # what there is was said
        if block:
            lines = []
            while (text := line("... ")).strip() != BLOCK:
                lines.append(text)
        while not block and lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(line("... "))
    return "\n".join(lines), block


class Chat:
    """The commands, and what is printed. Answers go to standard output, all else to standard error.

    Args:
        line: as `read_message` has it.
        patient: whether a message that is refused is told and not the end.
    """

    def __init__(self, talk: Talk, options: argparse.Namespace, line: Callable[[str], str], patient: bool) -> None:
        self.talk, self.options, self._line, self._patient = talk, options, line, patient
        self._answers = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "reset": self._reset,
            "system": self._system,
            "retry": self._retry,
            "temperature": lambda given: self._number("temperature", given),
            "top_p": lambda given: self._number("top_p", given),
            "save": self._save,
            "load": self._load,
            "help": self._help,
        }

    def run(self) -> None:
        """Until the end of input, /quit, or Ctrl-C at the prompt. Raises Refused."""
        while True:
            try:
                text, block = read_message(self._line)
            except (EOFError, KeyboardInterrupt):
                if self._patient:
                    print()
                return
            if text.strip() == "/quit" and not block:
                return
            try:
                if pieces := self._done(text, block):
                    self._show(pieces)
            except KeyboardInterrupt:
                note("interrupted")

    def _done(self, text: str, block: bool) -> Iterator[str] | None:
        """Carry a command out, or say a message: the answer. A refusal is told, and there is none then."""
        try:
            if text.startswith("/") and not text.startswith("//") and not block:
                return self._command(text[1:])
            return self.talk.ask(text.removeprefix("/" * (not block)), *self._how()) if text.strip() else None
        except Refused as error:
            if not self._patient:
                raise
            for problem in error.problems:
                print(f"error: {visible(problem)}", file=sys.stderr, flush=True)
            return None

    def _command(self, text: str) -> Iterator[str] | None:
        name, given = re.fullmatch(r"(\S*)\s*(.*?)\s*", text, re.DOTALL).groups()
        if name not in self._commands:
            raise Refused(f"unknown command /{name}{nearest(name, [*self._commands, 'quit'])} (/help lists them)")
        if given and name in ("reset", "retry", "help"):
            raise Refused(f"/{name} stands alone, got {shown(given)}")
        if not given and name in ("save", "load"):
            raise Refused(f"/{name} needs a file")
        return self._commands[name](given)

    def _how(self) -> tuple[Choice, tuple[int, int], int]:
        """How the next answer is drawn; each has random numbers of its own."""
        self._answers += 1
        options = self.options
        choice = Choice(temperature=options.temperature, top_p=options.top_p)
        return choice, (options.seed, self._answers), options.max_new_tokens

    def _show(self, pieces: Iterator[str]) -> None:
        """Print an answer as it comes. Ctrl-C ends it."""
        if self.talk.left_out:
            note(f"the oldest {self.talk.left_out} messages no longer fit the context and are left out")
        if self.talk.cut:
            note(f"the first {self.talk.cut} tokens no longer fit the context and are left out")
        last = ""
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    last = visible(piece)
                    print(last, end="", flush=True)
        except KeyboardInterrupt:
            last = "^C"
        finally:
            if not last.endswith("\n"):
                print(flush=True)
        if last == "^C":
            note("interrupted; /retry answers again")
        elif self.talk.full:
            why = {
                "max_new_tokens": f"--max_new_tokens {self.options.max_new_tokens}",
                "context": "the context is full",
            }
            note(f"cut off: {why[self.talk.full]}")

    def _reset(self, given: str) -> None:
        self.talk.turns = []
        note("a new conversation")

    def _system(self, given: str) -> None:
        self.talk.system = given
        note(f"system prompt: {given}" if given else "no system prompt")

    def _retry(self, given: str) -> Iterator[str]:
        return self.talk.retry(*self._how())

    def _number(self, name: str, given: str) -> None:
        if given:
            try:
                tried = argparse.Namespace(**{**vars(self.options), name: float(given)})
            except ValueError:
                raise Refused(f"/{name}: must be a number, got {shown(given)}") from None
            if problems := number_problems(tried, temperature=0):
                raise Refused([problem.replace("--", "/", 1) for problem in problems])
            self.options = tried
        note(f"{name} {getattr(self.options, name)}")

    def _save(self, given: str) -> None:
        self.talk.save(given)
        note(f"{len(self.talk.messages)} messages saved to {given}")

    def _load(self, given: str) -> None:
        self.talk.load(given)
        note(f"{len(self.talk.messages)} messages of {given}")

    def _help(self, given: str) -> None:
        print("\n".join(f"{name:<16} {line}" for name, line in HELP.items()), file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Tell a person something that no model said."""
    sys.stdout.flush()
    print(f"[{visible(text)}]", file=sys.stderr, flush=True)


def described(talk: Talk) -> str:
    """What is talked to, for a person."""
    form = talk.form
    how = "no chat template: the text goes on" if form.plain else "the template of data/chat"
    how = "its own chat template" if form.template else how
    size = sum(parameter.numel() for parameter in talk.model.parameters())
    return f"{size:,} parameters, a context of {form.block_size:,} tokens, {how}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. Raises Refused."""
    parser = argparse.ArgumentParser(
        prog=called("chat"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, a Hugging Face or PEFT folder, gpt2*, a ckpt.pt")
    parser.add_argument("--checkpoint", default="latest", help="latest | best | a folder's name (default latest)")
    parser.add_argument("--base", default="", help="of a PEFT folder: where its base model is now")
    parser.add_argument("--dataset", default="", help="take the tokenizer of this data set")
    parser.add_argument("--system", default="", help="the system prompt")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="of each answer (default 500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    parser.add_argument(
        "--top_p", type=float, default=0.95,
        help="draw among the fewest likeliest that have this probability together (default 0.95)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    options = parser.parse_args(arguments)
    if problems := number_problems(options, max_new_tokens=1, temperature=0, seed=0):
        raise Refused(problems)
    return options


def main(arguments: Sequence[str], watch: SignalWatch | None = None) -> int:
    """Talk until the end; returns the exit code. Raises Refused."""
    options = parse(arguments)
    with refusing():
        model, form, passed_over = open_talker(options.run, options.checkpoint, options.dataset, options.base)
        model, autocast = placed(model, options.device, options.dtype)
    for problem in passed_over:
        print(f"passed over: {problem}", file=sys.stderr)
    talk = Talk(model, form, options.system, autocast)
    patient = sys.stdin.isatty() and sys.stdout.isatty()
    if patient:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and knows earlier ones)
        note(described(talk))
        note("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the chat")
    sys.stdin.reconfigure(errors="replace")
    with watch.handed_over() if watch else contextlib.nullcontext():
        try:
            Chat(talk, options, lambda prompt: input(prompt if patient else "").rstrip("\r"), patient).run()
        except BrokenPipeError:  # whoever read the answers has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    script("chat", sys.argv[1:])
