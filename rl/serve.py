"""Serves an engine by URL: `python -m rl.serve RECIPE [section.key=value …] [--host H] [--port P]`.

Of the learner's recipe it reads `policy`, `rollout`, `loss.replay` and `learner.threads`, so both ends take the same file; the learner
names this server in `rollout.servers`. It listens on the loopback interface unless told, asks for the token that is in the environment
variable `rollout.server_token_env`, and is lent to one learner at a time. SIGTERM and Ctrl-C end it, and its engine with it. Exit codes:
0 ended when asked to, 1 the engine could not be started, 2 a mistake in recipe, inputs or address.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pydantic

from data.recipe import InputError, Section, read_recipe
from rl.command import command_line, mistake
from rl.config import LearnerConfig, LossConfig, PolicyConfig, RolloutConfig
from rl.inputs import check_drafts, check_policy, check_vllm, context_length, server_token

if TYPE_CHECKING:
    from rl.engines.http_server import HttpServer

PORT = 8400


class ServeRecipe(Section):
    """Of a recipe for anything, what an engine needs."""

    model_config = pydantic.ConfigDict(extra="ignore")
    policy: PolicyConfig
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    learner: LearnerConfig = LearnerConfig()


def main() -> int:
    parser = command_line("rl.serve", "Serves an engine to learners on other machines.")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on; beyond 127.0.0.1 a token is needed (default: %(default)s)")
    parser.add_argument("--port", type=int, default=PORT, help="0 is any that is free (default: %(default)s)")
    given = parser.parse_intermixed_args()
    try:
        recipe = read_recipe(given.recipe, given.overrides, ServeRecipe)
        check_policy(recipe.policy)
        check_vllm(recipe.rollout)
        check_drafts(recipe.rollout, Path(recipe.policy.path or ""))
        token = server_token(recipe.rollout)
        from rl.engines.http_server import bind  # loads torch

        server = bind(given.host, given.port, token)
    except InputError as error:
        return mistake(error)
    with server:
        if given.dry_run:
            return _dry_run(recipe, server)
        return _serve(recipe, server)


def _serve(recipe: ServeRecipe, server: "HttpServer") -> int:
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    import torch

    from rl.engines.make import make_host
    from rl.engines.vllm import preload

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("rl.engines.host").setLevel(logging.INFO)
    torch.set_num_threads(recipe.learner.threads or min(os.cpu_count() or 1, 16))
    if recipe.rollout.engine == "vllm":
        preload()
    work = Path(tempfile.mkdtemp(prefix="cohort-serve-"))
    try:
        longest = recipe.rollout.max_model_len or context_length(recipe.policy)
        host = make_host(recipe.rollout, recipe.policy, longest, work, returns_routes=recipe.loss.replay == "rollout")
    except InputError as error:
        shutil.rmtree(work)
        return mistake(error)
    server.serve(host)
    print(f"{server.url}: serves {recipe.policy.path} with {recipe.rollout.engine}; name it in rollout.servers", flush=True)
    try:
        while not asked.wait(0.2):
            failed = host.failed()
            if failed is not None:
                print(f"{server.url}: the engine could not be started: {failed}\nlogs are in {work}", file=sys.stderr)
                return 1
    finally:
        server.shutdown()
        host.close()
    shutil.rmtree(work)
    print(f"{server.url}: ended", flush=True)
    return 0


def _dry_run(recipe: ServeRecipe, server: "HttpServer") -> int:
    """What would be served; loads no model."""
    rollout = recipe.rollout
    longest = rollout.max_model_len or context_length(recipe.policy) or "as many tokens as the policy takes"
    print(f"{server.url}: would serve {recipe.policy.path} with {rollout.engine}, {recipe.policy.precision}, {rollout.slots} slots")
    gpus = rollout.tensor_parallel if rollout.engine == "vllm" else 1
    print(f"  prompt and completion together: {longest}; GPUs, if there are any: {gpus}")
    print(f"  a token is {'asked for' if server.token is not None else 'not asked for'}; name it in rollout.servers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
