"""What the service is for: real text in, the right passages out; with everything as `make example` starts it."""

from __future__ import annotations

import asyncio

import pytest

from tests.example.service import ROOT, Service, until

QUESTIONS = {
    "how long is an upstream left alone after it has failed?": ("engine.md", "circuit.open_s"),
    "how does one switch the mode without a restart?": ("migration.md", "EMBEDDING_MODE_FILE"),
    "what happens to requests on SIGTERM?": ("operations.md", "drains"),
    "what does the gate of a supervised child wait for?": ("service.md", "ready_timeout_s"),
    "is a whole batch refused for one bad input?": ("engine.md", "cut in"),
}


@pytest.mark.parametrize("question", QUESTIONS)
async def test_question_finds_the_passage_that_answers_it(example: Service, question: str) -> None:
    """The passage with the answer is among the first three."""
    document, words = QUESTIONS[question]

    answer = await example.search(question, limit=3)

    passages = answer.document["passages"]
    assert answer.status == 200
    assert any(passage["document"] == document and words in passage["content"] for passage in passages)


async def test_passages_come_nearest_first(example: Service) -> None:
    """As many as were asked for, the most similar first."""
    answer = await example.search("circuit breaker", limit=20)

    similarities = [passage["similarity"] for passage in answer.document["passages"]]
    assert len(similarities) == 20
    assert similarities == sorted(similarities, reverse=True)


async def test_greeting_names_what_was_taken_in(example: Service) -> None:
    """Every page of docs/ is there, and the lines to paste have the right address."""
    answer = await example.get("/documents")

    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= answer.document.keys()
    assert f"curl -s {example.url}/health" in example.greeting


async def test_document_taken_in_twice_is_embedded_once(example: Service) -> None:
    """A passage is known by what it says."""
    text = "# Otters\n\nThey hold hands while they sleep.\n\n# Ravens\n\nThey remember faces."

    first = await example.take_in(animals=text)
    second = await example.take_in(animals=text)

    assert first.document["documents"] == [{"name": "animals", "passages": 2, "embedded": 2}]
    assert second.document["documents"] == [{"name": "animals", "passages": 2, "embedded": 0}]


async def test_new_version_replaces_the_old_one(example: Service) -> None:
    """Only what is new is embedded; what is gone is not found any more; what has moved has its new place."""
    await example.take_in(drinks="# Tea\n\nGreen tea at eighty degrees.\n\n# Coffee\n\nGrind the beans.")

    answer = await example.take_in(drinks="# Milk\n\nFrom oats.\n\n# Tea\n\nGreen tea at eighty degrees.")

    assert answer.document["documents"] == [{"name": "drinks", "passages": 2, "embedded": 1}]
    found = (await example.search("grind the beans for coffee", limit=20)).document["passages"]
    assert not any("Grind" in passage["content"] for passage in found)
    tea = (await example.search("green tea at eighty degrees", limit=1)).document["passages"][0]
    assert (tea["document"], tea["position"]) == ("drinks", 1)


async def test_versions_that_come_at_once_do_not_mix(example: Service) -> None:
    """The last one stays, whole, whichever it was."""
    # Each shares some of its parts with the others, which makes these known to them.
    versions = [
        "\n\n".join(f"# Part {part}\n\nOf edition {version // part} about plumage." for part in (1, 2, 3))
        for version in range(6, 12)
    ]

    await asyncio.gather(*(example.take_in(plumage=version) for version in versions))

    found = (await example.search("part of an edition about plumage", limit=20)).document["passages"]
    parts = sorted((p["position"], p["content"]) for p in found if p["document"] == "plumage")
    assert "\n\n".join(content for _, content in parts) in versions


async def test_fifty_searches_at_once(example: Service) -> None:
    """All are answered, each with what it gets alone."""
    questions = [f"{question} ({number})" for number in range(10) for question in QUESTIONS]

    answers = await asyncio.gather(*map(example.search, questions))

    assert [answer.status for answer in answers] == [200] * 50
    alone = [(await example.search(question)).document for question in questions[::10]]
    assert [answer.document for answer in answers[::10]] == alone


async def test_ingestion_and_searches_beside_each_other(example: Service) -> None:
    """Searches go on while a long text is taken in."""
    text = "\n\n".join(f"# Rule {number}\n\nNever feed otter number {number} after midnight." for number in range(300))
    ingestion = asyncio.create_task(example.take_in(rules=text))

    answers = [await example.search(f"may I feed otter {number}?") for number in range(20)]

    assert [answer.status for answer in answers] == [200] * 20
    assert (await ingestion).document["documents"] == [{"name": "rules", "passages": 300, "embedded": 300}]


async def test_all_services_are_healthy(example: Service) -> None:
    """Each is named with its type and state, and the proxy with its process."""
    answer = await example.get("/health")

    assert answer.status == 200
    assert answer.document["status"] == "healthy"
    services = answer.document["services"]
    assert {name: (s["service_type"], s["state"]) for name, s in services.items()} == {
        "database": ("storage", "healthy"),
        "embeddings": ("embedding", "healthy"),
        "rag": ("tool", "healthy"),
    }
    await until(example.proxy, lambda proxy: proxy["state"] == "ready" and proxy["pid"])
