"""``ocvtp serve`` over HTTP: answers and usage among cancelled and broken requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serving.engine.asking import Answer, generate, transformers_model
from tests.serving.engine.server import Server, serving

pytest.importorskip("vllm", reason="needs vLLM: make test-serving")

ASSETS = Path(__file__).parents[3] / "assets"
TESTBED, PRUNER = ASSETS / "testbed", ASSETS / "testbed-pruner"
KEEP, TOKENS = 28, 256  # kept, and of an image
NEW = 4
KINDS = {"one": 58, "two": 12, "text": 10, "streamed": 8, "cancelled": 5, "broken": 4, "long": 2, "video": 1}
ANSWERED = ("one", "two", "text", "streamed")


@dataclass(frozen=True)
class Job:
    """A request of some kind about one or two scenes."""

    kind: str
    question: str
    scenes: tuple[str, ...]

    def images(self, scenes: dict[str, Image.Image]) -> list[Image.Image]:
        """That go along."""
        count = {"two": 2, "text": 0}.get(self.kind, 1)
        found = [scenes[name] for name in self.scenes[:count]]
        if self.kind == "long":
            # One that nobody else shows: vLLM's front end remembers a picture whose request it then turns
            # down, and believes that the engine has it. The next request with it gets status 500.
            return [image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) for image in found]
        return found


@dataclass
class Reply:
    """What came back.

    Attributes:
        status: of HTTP; 500 if a stream broke off, too.
        asked_again: times that the server said 500 before.
    """

    status: int = 0
    tokens: Answer = field(default_factory=list)
    prompt_tokens: int = 0
    asked_again: int = 0


@pytest.fixture(scope="module")
def scenes() -> dict[str, Image.Image]:
    return {path.name: Image.open(path).convert("RGB") for path in (ASSETS / "scenes").glob("*.png")}


def jobs(count: int) -> list[Job]:
    """Drawn once for all."""
    listed = json.loads((ASSETS / "scenes/questions.json").read_text())
    pool = [(scene["picture"], one["question"]) for scene in listed for one in scene["questions"]]
    draw = random.Random(0)
    kinds = draw.choices(list(KINDS), list(KINDS.values()), k=count)
    kinds[: len(KINDS)] = list(KINDS)  # each at least once
    made = []
    for kind in kinds:
        (scene, question), (other, _) = draw.choice(pool), draw.choice(pool)
        made.append(Job(kind, question, (scene, other)))
    return made


def as_url(image: Image.Image) -> str:
    """PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def body(job: Job, scenes: dict[str, Image.Image]) -> dict[str, Any]:
    """Of a chat completion."""
    urls = [as_url(image) for image in job.images(scenes)]
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    if job.kind == "broken":
        broken = ["data:image/png;base64,AAAA", "data:image/png;base64,%%%", urls[0][:-300]]
        content = [{"type": "image_url", "image_url": {"url": broken[len(job.question) % 3]}}]
    if job.kind == "video":
        content = [{"type": "video_url", "video_url": {"url": urls[0]}}]
    text = "what " * 600 if job.kind == "long" else job.question
    streamed = job.kind in ("streamed", "cancelled")
    return {
        "model": "m",
        "temperature": 0,
        "max_tokens": 200 if job.kind == "cancelled" else NEW,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": streamed,
        **({"stream_options": {"include_usage": True}} if streamed else {}),
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
    }


async def ask(session: Any, server: Server, job: Job, scenes: dict[str, Image.Image]) -> Reply:
    """One request, to its end or until it is given up; again after status 500, as OpenAI's client does it."""
    for again in range(3):
        reply = await _ask_once(session, server, job, scenes)
        reply.asked_again = again
        if reply.status != 500:
            break
    return reply


async def _ask_once(session: Any, server: Server, job: Job, scenes: dict[str, Image.Image]) -> Reply:
    reply = Reply()
    url = f"{server.url}/v1/chat/completions"
    async with session.post(url, json=body(job, scenes)) as response:
        reply.status = response.status
        if job.kind == "cancelled":
            await response.content.readany()
            response.close()
        elif job.kind == "streamed":
            async for line in response.content:
                if line.startswith(b"data: {"):
                    _read(json.loads(line[6:]), reply)
        else:
            _read(await response.json(), reply)
    return reply


def _read(part: dict[str, Any], reply: Reply) -> None:
    if "error" in part and reply.status == 200:
        reply.status = 500
    for choice in part.get("choices", ()):
        reply.tokens += choice.get("token_ids") or []
    if part.get("usage"):
        reply.prompt_tokens = part["usage"]["prompt_tokens"]


async def ask_all(server: Server, asked: list[Job], scenes: dict[str, Image.Image]) -> list[Reply]:
    """Twelve at once; then nothing must be left of them."""
    import aiohttp

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=240)) as session:
        await server.ready(session)
        gate = asyncio.Semaphore(12)

        async def one(job: Job) -> Reply:
            async with gate:
                return await ask(session, server, job, scenes)

        replies = await asyncio.gather(*(one(job) for job in asked))
        for _ in range(50):  # a given-up request ends with the step it is in
            running = await server.metric(session, "vllm:num_requests_running")
            used = await server.metric(session, "vllm:kv_cache_usage_perc")
            if running == used == 0:
                break
            await asyncio.sleep(0.2)
        assert (running, used) == (0, 0)
        await server.ready(session)
    # vLLM's front end may believe that the engine has a new picture that another request is still bringing.
    # It says so, and asks the client to try again (vLLM's PR 46747). Nothing else may have gone wrong.
    missed = server.log.read_text().count("Multi-modal cache miss for request")
    assert sum(reply.asked_again for reply in replies) <= missed, server.last_words()
    return list(replies)


def check(asked: list[Job], replies: list[Reply], settings: dict[str, Any], scenes: Any) -> None:
    """Every answer against :func:`ocvtp.apply`, every count against the unpruned prompt's."""
    from transformers import AutoProcessor

    model, processor = transformers_model(TESTBED, settings), AutoProcessor.from_pretrained(TESTBED)
    known: dict[tuple[str, ...], tuple[Answer, int]] = {}
    for job, reply in zip(asked, replies, strict=True):
        if job.kind in ("broken", "long", "video"):
            assert reply.status == 400, (job, reply)
        if job.kind not in ANSWERED:
            continue
        images = job.images(scenes)
        prompt = "<image>" * len(images) + f" {job.question} answer:"
        key = (prompt, *job.scenes[: len(images)])
        if key not in known:
            inputs = processor(
                images=images or None, text=prompt, return_tensors="pt", add_special_tokens=False
            )
            length = inputs["input_ids"].shape[1] - len(images) * (TOKENS - settings["keep"])
            known[key] = generate(model, inputs, NEW), length
        assert reply.status == 200, (job, reply)
        assert (reply.tokens, reply.prompt_tokens) == known[key], job


@pytest.mark.parametrize(
    "pruner",
    [pytest.param(str(PRUNER), id="pruner", marks=pytest.mark.quick), "farthest_point"],
)
def test_a_hundred_requests(tmp_path: Path, scenes: dict[str, Image.Image], pruner: str) -> None:
    asked = jobs(100 if pruner == str(PRUNER) else 30)
    with serving(TESTBED, tmp_path / "log", "--keep", str(KEEP), "--pruner", pruner) as server:
        replies = asyncio.run(ask_all(server, asked, scenes))
    check(asked, replies, {"keep": KEEP, "pruner": pruner}, scenes)


def test_two_engines_behind_one_address(tmp_path: Path, scenes: dict[str, Image.Image]) -> None:
    asked = jobs(40)
    options = ["--keep", str(KEEP), "--data-parallel-size", "2"]
    with serving(TESTBED, tmp_path / "log", *options) as server:
        replies = asyncio.run(ask_all(server, asked, scenes))
    check(asked, replies, {"keep": KEEP}, scenes)
