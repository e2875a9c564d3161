"""`command_check`: runs a command that the recipe names, such as `lean` or `gcc`, on the completion, in the sandbox; 1 if it accepts it.

The text is the last fenced block after the reasoning, or all of the answer where there is none. It stands in a file, `{file}` in the
command. The command accepts by exit code 0; the text is data to it. Where the text could end the command early, that proves nothing:
`append` puts text after it in which `{nonce}` is a random word that must then stand alone in a line of the output, and `reject` has
patterns that the text must not match, nor the output (`sorry`). Where the command runs what the text says (Lean's `#eval`), the text
could read the word in its own file: reject what runs (`#eval`, `run_cmd`, `IO`).
"""

import os
import re
import secrets
import shutil
from collections.abc import Callable
from typing import Any

from data.values import Messages
from rewards.code_tests import find_program, judge_each, read_limits
from rewards.sandbox.judge import Ending, Sandbox, shared_sandbox
from rewards.sandbox.limits import SandboxError
from rewards.text import answer_text, completion_text

_NOT_STARTED = (126, 127)


def prepare(
    command: list[str],
    file: str = "main.txt",
    append: str = "",
    reject: list[str] | None = None,
    paths: list[str] | None = None,
    limits: dict[str, Any] | None = None,
    backend: str = "auto",
) -> str:
    """As `code_tests.prepare`; it also looks for the command."""
    if os.path.basename(file) != file:
        raise ValueError(f"option file: '{file}' is no plain file name")
    _words(command, file)
    _patterns(reject)
    read_limits(limits)
    return _sandbox(backend, paths).warning


def command_check(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    command: list[str],
    prompt_texts: list[str] | None = None,
    log_extra: Callable[[str, list[Any]], None] | None = None,
    file: str = "main.txt",
    append: str = "",
    reject: list[str] | None = None,
    paths: list[str] | None = None,
    limits: dict[str, Any] | None = None,
    backend: str = "auto",
    **_: Any,
) -> list[float]:
    """Rewards 0.0 or 1.0, one for each completion; the Score's detail says why the command did not accept it.

    `command`: its words; `file`: the name of the file, with the ending that the command wants; `paths`: folders beside the system's
    that it reads, such as `~/.elan`; `limits`: fields of `rewards.sandbox.limits.Limits`.
    """
    words, patterns, bounds, sandbox = _words(command, file), _patterns(reject), read_limits(limits), _sandbox(backend, paths)

    def judge(index: int) -> tuple[float, str]:
        text, opened = completion_text(completions[index]), prompt_texts[index] if prompt_texts else ""
        answer = find_program(text, opened) or answer_text(text, opened)
        if not answer or not answer.strip():
            return 0.0, "there is nothing after the reasoning"
        for pattern in patterns:
            if pattern.search(answer):
                return 0.0, f"the text matches '{pattern.pattern}'"
        nonce = f"accepted-{secrets.token_hex(16)}"
        ending = sandbox.command(words, file, answer + append.replace("{nonce}", nonce), bounds)
        said = _refusal(ending, patterns, nonce if "{nonce}" in append else None)
        return float(not said), said

    judged = judge_each(judge, len(completions))
    if log_extra:
        log_extra("detail", [said for _, said in judged])
    return [value for value, _ in judged]


def _words(command: list[str], file: str) -> list[str]:
    """The command as it is run: by its absolute path, with the name of the file."""
    if not command or not any("{file}" in word for word in command[1:]):
        raise ValueError(f"option command: {command!r} has no word with {{file}} in it")
    found = shutil.which(os.path.expanduser(command[0]))
    if not found:
        raise ValueError(f"option command: there is no '{command[0]}' on this machine")
    return [os.path.abspath(found), *(word.replace("{file}", file) for word in command[1:])]


def _patterns(reject: list[str] | None) -> list[re.Pattern[str]]:
    try:
        return [re.compile(pattern) for pattern in reject or []]
    except re.error as error:
        raise ValueError(f"option reject: {error.pattern!r} is no regular expression: {error}") from None


def _sandbox(backend: str, paths: list[str] | None) -> Sandbox:
    return shared_sandbox(backend, [os.path.expanduser(path) for path in paths or []])


def _refusal(ending: Ending, patterns: list[re.Pattern[str]], nonce: str | None) -> str:
    """Why the command did not accept the text; nothing if it did."""
    output = (ending.stdout + b"\n" + ending.stderr).decode("utf-8", "replace")
    if ending.how == "exit" and ending.code in _NOT_STARTED:
        raise SandboxError(f"the command could not be started in the sandbox (option paths?): {output.strip()[-300:]}")
    if ending.how != "exit" or ending.code:
        return f"{ending.how} {ending.code}: {output.strip()[-300:]!r}"
    for pattern in patterns:
        if pattern.search(output):
            return f"the output matches '{pattern.pattern}'"
    if nonce and nonce not in map(str.strip, output.splitlines()):
        return "it ended before it had read all of the text"
    return ""
