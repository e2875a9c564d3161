"""The scorer against functions that hang, die, lie and print; and against functions written for trl."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from data.recipe import InputError
from rewards.config import RewardsConfig
from rewards.job import ScoreJob
from rewards.scorer import Scorer

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plugin(tmp_path):
    """Writes a plugin file outside the checkout; gives its path."""

    def write(code: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(textwrap.dedent(code))
        return str(tmp_path / name)

    return write


def config(parts: list[dict], plugins: list[str] = (), **rest) -> RewardsConfig:
    return RewardsConfig.model_validate({"plugins": list(plugins), "parts": parts, "workers": 2, **rest})


def job(completions: list[str], group_id: str = "g", prompt="2+2=", prompt_text: str = "2+2=", step: int = 0, **columns) -> ScoreJob:
    ids = [np.arange(len(text), dtype=np.int32) for text in completions]
    return ScoreJob(group_id, prompt, prompt_text, completions, ids, columns, step)


def values(scores: list) -> list:
    return [score.value for score in scores]


def test_what_a_tool_wrote_is_told_to_those_who_ask_and_a_group_of_none_is_done_at_once(plugin):
    path = plugin("def own(completions, completion_masks=None, **kwargs):\n    return [sum(mask) for mask in completion_masks or []]\n")
    with Scorer(config([{"name": "own"}], [f"{path}:own"])) as scorer:
        masks = [np.array([1, 0, 1], np.uint8), np.array([1, 1, 1], np.uint8)]
        ((two, none)) = scorer.score([dataclasses.replace(job(["abc", "abd"]), completion_masks=masks), job([])])
        assert values(two) == [2.0, 3.0] and none == []


POISON = """
    import os, signal, sys, time

    def poison(prompts, completions, **kwargs):
        for text in completions:
            if "hang" in text:
                time.sleep(600)
            if "die" in text:
                os.kill(os.getpid(), signal.SIGKILL)
            if "exit" in text:
                os._exit(0)
            if "raise" in text:
                raise KeyError("no such thing")
            if "garbage" in text:
                for fd in range(3, 100):
                    try:
                        os.write(fd, b'{"id": 0, "values": [1.0]}' + bytes([10]))
                    except OSError:
                        pass
            if "eat" in text:
                bytearray(8 << 30)
        print("printed by a plugin", completions, flush=True)
        if any("short" in text for text in completions):
            return [1.0] * (len(completions) - 1)
        return [float("nan") if "nan" in text else "1.0" if "text" in text else 1.0 for text in completions]
"""


def test_poison_fails_alone_and_every_right_answer_beside_it_scores_right(plugin):
    said = {
        "hang": ("timeout", "poison: no answer within 1.5 s, its process was killed"),
        "die": ("error", "poison: its process was killed by SIGKILL"),
        "exit": ("error", "poison: its process ended with exit code 0"),
        "raise": ("error", "poison: KeyError: 'no such thing' (mine.py:13)"),
        "garbage": ("error", "poison: its process wrote what is no reply on the reply pipe"),
        "eat": ("error", "poison: MemoryError: (mine.py:21)"),
        "short": ("error", "poison: returned 0 values for 1 completions"),
        "nan": ("error", "poison: returned nan"),
        "text": ("error", "poison: returned '1.0', which is no number"),
    }
    parts = [{"name": "math_answer"}, {"name": "poison", "weight": 0.5, "timeout_s": 1.5}]
    with Scorer(config(parts, [plugin(POISON) + ":poison"], memory_mb=2048)) as scorer:
        kinds = [*said, *["right"] * 250]  # 1,000 right answers beside them
        for number, kind in enumerate(kinds):
            scorer.submit(number, job([f"#### 4 {'' if i != 2 else kind}".strip() for i in range(4)], f"g{number}", answer="4"))
        scores: dict = {}
        while len(scores) < len(kinds):
            scores |= dict(scorer.poll(10.0))
        for number, kind in enumerate(kinds):
            for index, score in enumerate(scores[number]):
                if kind in said and index == 2:
                    assert (score.value, score.status) == (None, said[kind][0]), kind
                    assert score.detail.startswith(said[kind][1]), kind
                elif kind == "right" and index == 2:
                    assert score.parts["poison"] == 1.0  # `4 right` is the number 4 with a unit
                else:
                    assert (score.value, score.status) == (1.5, "ok"), (kind, score)
        hang = scorer.explain(scores[0])
        assert hang.startswith("1 of 4 scores failed, 1 of them in the reward function 'poison': poison: no answer within 1.5 s")
        assert 'mine.py", line 7 in poison' in hang  # where it hung
        assert "no such thing" in scorer.explain(scores[3])


TRL = """
    import asyncio
    import numpy as np
    from helper import CONSTANT

    def pattern(completions, target, trainer_state, log_metric=None, log_extra=None, **kwargs):
        contents = [completion[0]["content"] for completion in completions]
        log_extra("seen", contents)
        log_metric("share_of_yes", sum("yes" in text for text in contents) / len(contents))
        assert sorted(kwargs) == ["completion_ids", "difficulty", "group_ids", "prompt_texts", "prompts"], sorted(kwargs)
        assert [prompt[-1]["role"] for prompt in kwargs["prompts"]] == ["user"] * len(contents)
        return np.array([float(text == t) + trainer_state.global_step for text, t in zip(contents, target, strict=True)])

    async def waits(prompts, completions, completion_ids, **kwargs):
        await asyncio.sleep(0.001)
        return [None if len(ids) == 3 else CONSTANT * len(ids) for ids in completion_ids]
"""


def test_functions_written_for_trl_run_unchanged_sync_and_async(plugin):
    path = plugin(TRL)
    plugin("CONSTANT = np = 10", "helper.py")
    chosen = config([{"name": "pattern"}, {"name": "waits", "weight": 0.1}], [f"{path}:pattern", f"{path}:waits"])
    chat = [{"role": "user", "content": "2+2="}]
    with Scorer(chosen) as scorer:
        scorer.submit("a", job(["yes", "no"], prompt=chat, step=7, target="yes", difficulty=3))
        ((key, scores),) = scorer.poll(30.0)
        assert key == "a"
        assert [score.parts for score in scores] == [{"pattern": 8.0, "waits": None}, {"pattern": 7.0, "waits": 20.0}]
        assert values(scores) == [8.0, 9.0]
        assert scorer.extras("a") == {"seen": ["yes", "no"]} and scorer.extras("a") == {}
        logged = scorer.metrics()
        assert logged["share_of_yes"] == 0.5
        assert set(logged) == {"share_of_yes", "time/reward/pattern_s", "time/reward/waits_s"}
        assert scorer.metrics() == {}


def test_columns_that_nobody_asks_for_do_not_pile_up(plugin, monkeypatch):
    monkeypatch.setattr("rewards.scorer._EXTRAS", 2)
    path = plugin("""
        def noted(completions, log_extra, **kwargs):
            log_extra("said", completions)
            return [1.0] * len(completions)
    """)
    with Scorer(config([{"name": "noted"}], [f"{path}:noted"])) as scorer:
        scorer.score([job([text]) for text in ("a", "b", "c")])
        held = [scorer.extras(index) for index in range(3)]
    assert held.count({}) == 1 and sum("said" in each for each in held) == 2


def test_text_prompts_reach_a_function_as_text_with_copies_of_the_columns(plugin):
    path = plugin("""
        def greedy(prompts, completions, tests, **kwargs):
            tests[0].append("changed")
            return [float(prompt == "2+2=" and completion == "4" and tests == [[1, "changed"], [1]])
                    for prompt, completion in zip(prompts, completions)]
    """)
    with Scorer(config([{"name": "greedy"}], [path + ":greedy"])) as scorer:
        assert values(scorer.score([job(["4", "5"], tests=[1], prompt_ids="x")])[0]) == [1.0, 0.0]


def test_a_function_that_compares_siblings_is_not_asked_again_one_by_one(plugin):
    path = plugin("""
        def rank(completions, group_ids, **kwargs):
            assert len(completions) == 3, "alone"
            assert group_ids == ["g"] * 3
            raise RuntimeError("as a whole")
    """)
    with Scorer(config([{"name": "rank"}], [path + ":rank"])) as scorer:
        (scores,) = scorer.score([job(["a", "b", "c"])])
    assert [score.detail for score in scores] == ["rank: RuntimeError: as a whole (mine.py:5)"] * 3


def test_builtins_score_a_group_with_gate_and_prompt_that_opens_the_reasoning():
    with Scorer(config([{"name": "math_answer", "requires": "think_format"}])) as scorer:
        completions = ["2</think><answer>4</answer>", "2</think><answer>5</answer>", "<answer>4</answer>"]
        (scores,) = scorer.score([job(completions, prompt_text="2+2=<think>", answer="4")])
        assert values(scores) == [1.0, 0.0, 0.0]
        assert scores[2].detail == "math_answer: counts 0, as its gate think_format gave 0"
        (none,) = scorer.score([job(completions, prompt_text="2+2=<think>")])
        assert [score.status for score in none] == ["unscored", "unscored", "ok"]


def test_the_environment_is_cleaned_except_for_what_the_recipe_names(plugin, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k")
    monkeypatch.setenv("OTHER_KEY", "o")
    path = plugin("""
        import os
        def sees(completions, **kwargs):
            return [float("JUDGE_KEY" in os.environ) - float("OTHER_KEY" in os.environ)]
    """)
    with Scorer(config([{"name": "sees", "env": ["JUDGE_KEY"]}], [path + ":sees"])) as scorer:
        assert values(scorer.score([job(["a"])])[0]) == [1.0]
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(InputError, match="JUDGE_KEY that it names is not set"):
        Scorer(config([{"name": "sees", "env": ["JUDGE_KEY"]}], [path + ":sees"])).start()


def test_gpus_caches_and_certificates_are_seen_and_proxies_without_a_password(plugin, monkeypatch):
    kept = {
        "CUDA_VISIBLE_DEVICES": "3", "HF_HOME": "/h", "HF_HUB_CACHE": "/c", "HF_HUB_OFFLINE": "1", "SSL_CERT_FILE": "/s",
        "NO_PROXY": "inside", "HTTP_PROXY": "http://proxy:3128", "https_proxy": "http://proxy:3128",
    }  # fmt: skip
    for name, value in {**kept, "HTTPS_PROXY": "http://me:secret@proxy:3128", "HF_TOKEN": "t"}.items():
        monkeypatch.setenv(name, value)
    path = plugin("""
        import json, os
        def sees(completions, log_extra, **kwargs):
            log_extra("environment", [json.dumps(dict(os.environ))])
            return [1.0]
    """)
    for named in ([], ["HTTPS_PROXY"]):
        with Scorer(config([{"name": "sees", "env": named}], [path + ":sees"])) as scorer:
            scorer.score([job(["a"])])
            seen = json.loads(scorer.extras(0)["environment"][0])
        assert seen.items() >= kept.items() and "HF_TOKEN" not in seen
        assert ("HTTPS_PROXY" in seen) == bool(named)


def test_options_are_keyword_arguments_of_the_function(plugin):
    path = plugin("""
        def brevity(completions, target=1, **kwargs):
            return [target - len(text) for text in completions]
    """)
    with Scorer(config([{"name": "brevity", "options": {"target": 10}}], [path + ":brevity"])) as scorer:
        assert values(scorer.score([job(["abc"])])[0]) == [7.0]
    wrong = Scorer(config([{"name": "brevity", "options": {"targt": 10}}], [path + ":brevity"]))
    with pytest.raises(InputError, match="brevity: cannot be loaded: has no parameter 'targt'"):
        wrong.start()


ASYNC = """
    import asyncio, os, signal, time

    async def slow(completions, **kwargs):
        for text in completions:
            if text == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if text == "forever":
                await asyncio.sleep(600)
            if text == "raise":
                raise KeyError("inside")
        await asyncio.sleep(0.3)
        return [1.0] * len(completions)

    def quick(completions, log_extra, **kwargs):
        log_extra("detail", ["said " + text for text in completions])
        return [0.5] * len(completions)
"""


def test_async_calls_run_at_once_up_to_the_limit(plugin):
    path = plugin(ASYNC)
    took = {}
    for limit in (10, 2):
        with Scorer(config([{"name": "slow", "at_once": limit}], [path + ":slow"])) as scorer:
            began = time.monotonic()
            assert scorer.score([job(["a"])] * 10)[9][0].value == 1.0
            took[limit] = time.monotonic() - began
    assert took[10] < 1.2 and took[2] > 1.4  # one after another they would take 3 seconds


def test_of_async_calls_only_the_culprit_fails(plugin):
    path = plugin(ASYNC)
    parts = [{"name": "slow", "timeout_s": 2.0}, {"name": "quick"}]
    texts = ["a", "die", "b", "forever", "c", "raise", "d", "e"]
    with Scorer(config(parts, [path + ":slow", path + ":quick"])) as scorer:
        scores = [scores[0] for scores in scorer.score([job([text]) for text in texts])]
    assert [score.value for score in scores] == [1.5, None, 1.5, None, 1.5, None, 1.5, 1.5]
    assert [scores[i].status for i in (1, 3, 5)] == ["error", "timeout", "error"]
    assert scores[1].detail == "slow: its process was killed by SIGKILL"
    assert scores[0].detail == "quick: said a"


def test_a_source_of_async_functions_has_one_worker_and_suspects_run_one_after_another(plugin, tmp_path):
    path = plugin("""
        import asyncio, os, signal
        async def slow(completions, **kwargs):
            await asyncio.sleep(0.3)
            if completions == ["die"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return [1.0]
    """)
    with Scorer(config([{"name": "slow"}], [path + ":slow"]), tmp_path) as scorer:
        scores = [scores[0] for scores in scorer.score([job([text]) for text in ["a", "die", "b", "c", "d"]])]
    assert values(scores) == [1.0, None, 1.0, 1.0, 1.0]
    assert len(list(tmp_path.glob("*.log"))) == 3  # all at once, until the death; then up to the culprit; then the rest


BESIDE = """
    import asyncio, time

    def busy(completions, **kwargs):
        time.sleep(600 if "hang" in completions[0] else 1.5)
        return [1.0]

    async def waits(completions, **kwargs):
        await asyncio.sleep(600 if "forever" in completions[0] else 0.0)
        return [10.0]
"""


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a", {"busy": 1.0, "waits": 10.0}),
        ("forever", {"busy": 1.0, "waits": None}),
        ("hang", {"busy": None, "waits": 10.0}),
    ],
)
def test_the_time_of_an_async_call_begins_when_its_worker_can_begin_it(plugin, text, parts):
    path = plugin(BESIDE)
    both = [{"name": "busy", "timeout_s": 3.0}, {"name": "waits", "timeout_s": 1.0}]
    with Scorer(config(both, [path + ":busy", path + ":waits"], workers=1)) as scorer:
        began = time.monotonic()
        ((score,),) = scorer.score([job([text])])
        seconds = time.monotonic() - began
    assert score.parts == parts
    assert score.status == ("ok" if text == "a" else "timeout")
    assert text != "forever" or seconds >= 2.4


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_reply_that_is_none_fails_the_call_that_it_names(plugin, kind):
    path = plugin(f"""
        import os
        {kind} forges(completions, **kwargs):
            for fd in range(3, 100):
                try:
                    os.write(fd, b'{{"id": 1}}' + bytes([10]))
                except OSError:
                    pass
            return [1.0]
    """)
    with Scorer(config([{"name": "forges"}], [path + ":forges"])) as scorer:
        scorer.submit(0, job(["a"]))
        ((_, (score,)),) = scorer.poll(20.0)
    assert score.detail == "forges: its process wrote what is no reply on the reply pipe"


STARTS = """
    import os, signal, time
    from pathlib import Path

    started = Path(__file__).with_name("started")
    started.write_text(started.read_text() + "x" if started.exists() else "x")
    if len(started.read_text()) in FAILING:
        ENDING

    def slow(completions, **kwargs):
        time.sleep(0.4)
        if completions == ["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return [1.0]
"""


@pytest.mark.parametrize("ending", ["raise RuntimeError('too full')", "os._exit(3)"])
def test_a_further_worker_that_fails_to_start_is_dropped_and_tried_again(plugin, monkeypatch, capsys, ending):
    monkeypatch.setattr("rewards.lane.FIRST_PAUSE_S", 0.1)
    path = plugin(STARTS.replace("FAILING", "(2, 4)").replace("ENDING", ending))
    with Scorer(config([{"name": "slow"}], [path + ":slow"])) as scorer:
        extra = scorer.score([job(["a"])] * 8)
        replaced = scorer.score([job([text]) for text in ("die", "b", "die", "c", "d", "e")])
    assert [scores[0].value for scores in extra] == [1.0] * 8
    assert [scores[0].value for scores in replaced] == [None, 1.0, None, 1.0, 1.0, 1.0]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith("rewards: ") and line.endswith("; the next worker starts in 0.1 s at the earliest") for line in said)


def test_a_source_is_given_up_when_no_worker_is_left_and_several_starts_failed_in_a_row(plugin, monkeypatch, capsys):
    monkeypatch.setattr("rewards.lane.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("rewards.lane.FAILED_STARTS", 3)
    path = plugin(STARTS.replace("FAILING", "(2, 3, 4)").replace("ENDING", "raise RuntimeError('gone')"))
    with Scorer(config([{"name": "slow"}], [path + ":slow"], workers=1)) as scorer:
        scores = [scores[0] for scores in scorer.score([job([text]) for text in ("a", "die", "b", "c")])]
    assert values(scores) == [1.0, None, None, None]
    assert scores[1].detail == "slow: its process was killed by SIGKILL"
    assert [score.detail for score in scores[2:]] == ["slow: slow: cannot be loaded: RuntimeError: gone (mine.py:8)"] * 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_routes_aliases_shadows_and_normalisation_reach_the_scores(plugin):
    path = plugin("""
        def size(completions, scale=1, **kwargs):
            return [scale * len(text) for text in completions]
        def broken(completions, **kwargs):
            raise RuntimeError("a shadow")
    """)
    chosen = config(
        [{"name": "math_answer"}, {"name": "size", "alias": "big", "options": {"scale": 10}}, {"name": "size", "weight": 0.5}],
        [path + ":size", path + ":broken"],
        route={"column": "domain", "parts": {"math": ["math_answer", "size"], "chat": ["big"]}},
        shadow=[{"name": "think_format"}, {"name": "broken"}],
    )
    with Scorer(chosen) as scorer:
        maths, chat = scorer.score([job(["#### 4"], answer="4", domain="math"), job(["ab"], domain="chat", scale=5)])
        assert maths[0].parts == {"math_answer": 1.0, "size": 6.0, "think_format": 0.0, "broken": None}
        assert maths[0].value == 4.0 and "a shadow" in maths[0].detail
        assert chat[0].parts == {"big": 20.0, "think_format": 0.0, "broken": None} and chat[0].value == 20.0
    with Scorer(config([{"name": "math_answer"}], normalize="group")) as scorer:
        (scores,) = scorer.score([job(["#### 4", "#### 5"], answer="4")])
        assert values(scores) == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001])


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (
            "import no_such_library\ndef f(**kwargs): ...",
            "rewards: f: cannot be loaded: ModuleNotFoundError: No module named 'no_such_library'",
        ),
        ("def g(completions): ...\nf = g", "rewards: f: cannot be loaded: takes no **kwargs"),
        ("import os; os._exit(3)\ndef f(**kwargs): ...", "cannot be loaded: its process ended with exit code 3"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_one_line_at_the_start(plugin, code, line):
    with pytest.raises(InputError) as caught:
        Scorer(config([{"name": "f"}], [plugin(code) + ":f"])).start()
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_column_that_json_cannot_carry_is_refused_by_value():
    with Scorer(config([{"name": "math_answer"}])) as scorer:
        with pytest.raises(ValueError, match="cannot be given the bytes"):
            scorer.submit(0, job(["a"], answer=b"4"))
        assert values(scorer.score([job(["#### 4"], answer=np.int64(4), image=b"not for this function")])[0]) == [1.0]


def test_scoring_goes_on_while_the_caller_does_something_else(plugin):
    path = plugin("""
        import time
        def slow(completions, **kwargs):
            time.sleep(0.2)
            return [1.0] * len(completions)
    """)
    with Scorer(config([{"name": "slow"}], [path + ":slow"])) as scorer:
        for number in range(4):
            scorer.submit(number, job(["a"]))
        assert scorer.poll() == []
        time.sleep(1.0)
        assert len(scorer.poll()) >= 2  # nobody asked in between


@pytest.mark.skipif(sys.platform != "linux", reason="a worker in the middle of a call dies with its trainer on Linux only")
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_trainer(plugin, tmp_path, ending):
    pids = tmp_path / "pids"
    path = plugin(f"""
        import os, time
        def hangs(completions, **kwargs):
            with open({str(pids)!r}, "a") as file:
                print(os.getpid(), file=file, flush=True)
            while True:
                pass
    """)
    trainer = f"""
from tests.rewards.test_scorer import config, job
from rewards.scorer import Scorer
scorer = Scorer(config([{{"name": "hangs"}}], [{path + ":hangs"!r}]))
scorer.start()
scorer.score([job(["a"]), job(["b"])])
"""
    # A shell's background job, as tests may be, ignores Ctrl-C, and what it starts inherits that.
    hears_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen([sys.executable, "-c", trainer], cwd=CHECKOUT, stderr=subprocess.DEVNULL, preexec_fn=hears_ctrl_c)
    deadline = time.monotonic() + 20
    while (not pids.exists() or len(pids.read_text().split()) < 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(pid) for pid in pids.read_text().split()]
    assert len(workers) == 2
    running.send_signal(ending)
    running.wait(timeout=20)
    while any(_runs(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in workers)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
