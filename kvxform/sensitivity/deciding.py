"""Which format each stream gets: an exact choice from measured costs, or KVTuner's search."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Literal

from kvxform.codecs.base import Codec
from kvxform.sensitivity.caches import Stream
from kvxform.sensitivity.choosing import Offer, choose
from kvxform.sensitivity.formats import Format
from kvxform.sensitivity.measuring import Bench
from kvxform.sensitivity.tuning import Choice, Group, group_layers, search

Formats = Mapping[Stream, tuple[Format, ...]]
Assignment = dict[Stream, int]  # a format for each stream, as an index into its formats


def uniform(formats: Formats) -> Iterator[Assignment]:
    """Yield the assignments that treat all layers alike."""
    counts = {name: len(row) for (_, name), row in formats.items()}
    for picked in itertools.product(*(range(count) for count in counts.values())):
        by_name = dict(zip(counts, picked, strict=True))
        yield {stream: by_name[stream[1]] for stream in formats}


def smallest(formats: Formats) -> Assignment:
    """Return the assignment of fewest bytes."""
    return {
        stream: min(range(len(row)), key=lambda i: row[i].size) for stream, row in formats.items()
    }


def size_of(formats: Formats, assignment: Assignment) -> float:
    """Return bytes per token of all streams."""
    return sum(formats[stream][index].size for stream, index in assignment.items())


def codecs_of(formats: Formats, assignment: Assignment) -> dict[Stream, Codec]:
    """Return the codec of each stream."""
    return {stream: formats[stream][index].codec for stream, index in assignment.items()}


def decide_exactly(bench: Bench, formats: Formats, budget: float) -> Assignment:
    """Return the least sum of measured divergences within the budget.

    Each format of each stream is measured alone, with an exact cache elsewhere; that their
    divergences add up is an assumption.
    """
    offers = {
        stream: [Offer(f.size, bench.divergence({stream: f.codec})) for f in row]
        for stream, row in formats.items()
    }
    found = choose(offers, budget)
    assert found is not None, "the budget allows the smallest formats"
    return found


def decide_by_search(
    bench: Bench,
    formats: Formats,
    budget: float,
    *,
    objective: Literal["kl", "error"],
    trials: int,
    seed: int,
) -> Assignment:
    """Return what KVTuner's search finds; see `tuning`.

    Args:
        bench: What measures.
        formats: The formats of each stream.
        budget: Largest size.
        objective: What is made small: `kl`, or `error`, summed over layers.
        trials: Choices to look at.
        seed: Seed of the search.
    """
    pairs = _pairs_by_layer(formats)
    offers = {layer: _measure_pairs(bench, formats, row) for layer, row in pairs.items()}
    groups = group_layers(offers)

    def assignment(choice: Choice) -> Assignment:
        joined: Assignment = {}
        for layer, index in _by_layer(groups, choice):
            joined |= pairs[layer][index]
        return joined

    def error(choice: Choice) -> float:
        return sum(offers[layer][index].cost for layer, index in _by_layer(groups, choice))

    def divergence(choice: Choice) -> float:
        return bench.divergence(codecs_of(formats, assignment(choice)))

    found = search(
        groups,
        lambda choice: size_of(formats, assignment(choice)),
        divergence if objective == "kl" else error,
        budget=budget,
        trials=trials,
        seed=seed,
        first=[tuple(0 for _ in groups)],
    )
    assert found is not None, "the smallest pairs keep the budget"
    return assignment(found)


def _pairs_by_layer(formats: Formats) -> dict[int, list[Assignment]]:
    """Return all formats of K with all formats of V, for every layer."""
    streams: dict[int, list[Stream]] = {}
    for stream in formats:
        streams.setdefault(stream[0], []).append(stream)
    return {
        layer: [
            dict(zip(own, picked, strict=True))
            for picked in itertools.product(*(range(len(formats[stream])) for stream in own))
        ]
        for layer, own in streams.items()
    }


def _measure_pairs(bench: Bench, formats: Formats, pairs: list[Assignment]) -> list[Offer]:
    return [
        Offer(
            size_of(formats, pair),
            bench.attention_error(next(iter(pair))[0], codecs_of(formats, pair)),
        )
        for pair in pairs
    ]


def _by_layer(groups: list[Group], choice: Choice) -> Iterator[tuple[int, int]]:
    """Yield layers, and which of their pairs they get."""
    for group, index in zip(groups, choice, strict=True):
        for layer in group.layers:
            yield layer, group.front[index]
