"""`command_check`: runs a command that the recipe names, such as `lean` or `gcc`, on the completion, in the sandbox; 1 if it accepts it.

The text is the last fenced block after the reasoning, or all of the answer where there is none. It stands in a file, `{file}` in the
command. The command accepts by exit code 0; the text is data to it. `reject` has patterns that neither the text nor the output may
match (`sorry`). `append`, an option or the row's column, is what is asked of the text: the theorem that it has to prove, say. It
stands behind the text; where the text could end the command early, put `{nonce}` into it, a random word that must then stand alone
in a line of the output.

Where the command runs what the text says (Lean's `#eval`), the text could read that word in its own file, and end with any exit code.
There, let a second command judge, which the text cannot reach: `command` then makes the files `keep` of the text alone, and `then`
runs in a fresh sandbox that has those files and a file with `append`, `{file}` in it. It alone accepts.

    command: [lean, -o, Main.olean, "{file}"]      file: Main.lean      keep: [Main.olean]
    then: [env, LEAN_PATH=., lean, "{file}"]       append: "import Main\n…the theorem, by the name it must have…"
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
    then: list[str] | None = None,
    keep: list[str] | None = None,
    reject: list[str] | None = None,
    paths: list[str] | None = None,
    limits: dict[str, Any] | None = None,
    backend: str = "auto",
) -> str:
    """As `code_tests.prepare`; it also looks for the commands."""
    for option, name in [("file", file), *(("keep", name) for name in keep or [])]:
        if os.path.basename(name) != name or not name:
            raise ValueError(f"option {option}: '{name}' is no plain file name")
    if (then is None) != (not keep):
        raise ValueError("options then, keep: a second command needs the files that the first one leaves, and they need it")
    _words("command", command, file)
    if then:
        _words("then", then, _checks_in(file))
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
    append: str | list[str | None] = "",
    then: list[str] | None = None,
    keep: list[str] | None = None,
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
    words, patterns, bounds, sandbox = _words("command", command, file), _patterns(reject), read_limits(limits), _sandbox(backend, paths)
    then_words = _words("then", then, _checks_in(file)) if then else []

    def judge(index: int) -> tuple[float, str]:
        text, opened = completion_text(completions[index]), prompt_texts[index] if prompt_texts else ""
        answer = find_program(text, opened) or answer_text(text, opened)
        if not answer or not answer.strip():
            return 0.0, "there is nothing after the reasoning"
        for pattern in patterns:
            if pattern.search(answer):
                return 0.0, f"the text matches '{pattern.pattern}'"
        asked = (append[index] if isinstance(append, list) else append) or ""
        nonce = f"accepted-{secrets.token_hex(16)}" if "{nonce}" in asked else None
        asked = asked.replace("{nonce}", nonce or "")
        if not then_words:
            said = _refusal(sandbox.command(words, file, answer + asked, bounds), patterns, nonce)
            return float(not said), said
        first = sandbox.command(words, file, answer, bounds, keep or ())
        files, said = _files(first, keep or []), _refusal(first, patterns, None)
        if not said and files is None:
            said = f"the command left no {' or '.join(keep or [])}"
        if not said:
            said = _refusal(sandbox.command(then_words, _checks_in(file), asked, bounds, beside=files), patterns, nonce)
        return float(not said), said

    judged = judge_each(judge, len(completions))
    if log_extra:
        log_extra("detail", [said for _, said in judged])
    return [value for value, _ in judged]


def _words(option: str, command: list[str], file: str) -> list[str]:
    """A command as it is run: by its absolute path, with the name of the file."""
    if not command or not any("{file}" in word for word in command[1:]):
        raise ValueError(f"option {option}: {command!r} has no word with {{file}} in it")
    found = shutil.which(os.path.expanduser(command[0]))
    if not found:
        raise ValueError(f"option {option}: there is no '{command[0]}' on this machine")
    return [os.path.abspath(found), *(word.replace("{file}", file) for word in command[1:])]


def _checks_in(file: str) -> str:
    """The file of the second command: `check.lean` for `Main.lean`."""
    return f"check{os.path.splitext(file)[1]}"


def _files(ending: Ending, keep: list[str]) -> dict[str, str] | None:
    """The files that a command left; None if one is missing. It is the text's word, so nothing of it is taken for granted."""
    files = (ending.result or {}).get("files")
    if not isinstance(files, dict) or not all(isinstance(files.get(name), str) for name in keep):
        return None
    try:
        return {name: bytes.fromhex(files[name]).hex() for name in keep}
    except ValueError:
        return None


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
