"""Checks of token files: whole, of the right element type, within the vocabulary, from the tokenizer at hand."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lockstep.data.indexed import IndexedDataset, bin_path, idx_path, optimal_dtype, sha256_file
from lockstep.data.sidecar import Sidecar, read_sidecar, sidecar_path
from lockstep.data.tokenizers import NullTokenizer, Tokenizer
from lockstep.errors import UserError

_SCAN_TOKENS = 1 << 22
_SAMPLED_DOCUMENTS = 8
_SAMPLED_TOKENS = 2048
_MISMATCH_ABOVE = 0.5  # share of sampled documents that do not survive decoding and encoding again


@dataclass
class VerifyReport:
    """Outcome of ``verify``.

    Attributes:
        prefix: the files checked.
        problems: what is wrong, a sentence each; empty when the files are good.
        notes: what was not checked and why, and what is worth knowing.
        facts: counts and hashes by name.
    """

    prefix: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """No problem was found."""
        return not self.problems


def verify(prefix: str, tokenizer: Tokenizer | None = None, vocab_size: int | None = None) -> VerifyReport:
    """Check a pair of token files and return what was found; reads every byte.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        tokenizer: the tokenizer that training would use; None to leave out what needs it.
        vocab_size: number of legal ids; the tokenizer's, or the recorded one, when None.
    """
    report = VerifyReport(prefix)
    try:
        data = IndexedDataset(prefix)
        sidecar = read_sidecar(prefix)
    except UserError as error:
        report.problems.append(str(error))
        return report
    report.facts.update(data.identity())
    recorded = sidecar.tokenizer.get("vocab_size") if sidecar else None
    size = vocab_size or (tokenizer.vocab_size if tokenizer else recorded)
    if sidecar is None:
        report.notes.append(
            f"{sidecar_path(prefix)} does not exist: the hashes and the tokenizer of preparation cannot be checked"
        )
    else:
        _check_recorded(data, sidecar, report)
    _check_dtype(data, size, sidecar, report)
    _check_ids(data, size, report)
    if tokenizer is None:
        report.notes.append("no tokenizer given: whether the data was made with it is not checked")
    elif sidecar is not None:
        _check_tokenizer(sidecar, tokenizer, report)
    elif report.ok:
        _check_plausible(data, tokenizer, report)
    return report


def _check_recorded(data: IndexedDataset, sidecar: Sidecar, report: VerifyReport) -> None:
    for path, key in ((bin_path(data.prefix), "bin_sha256"), (idx_path(data.prefix), "idx_sha256")):
        found = sha256_file(path)
        report.facts[key] = found
        if found != sidecar.files.get(key):
            report.problems.append(
                f"{path} is not the file that was prepared: sha256 {found[:16]}..., recorded "
                f"{str(sidecar.files.get(key))[:16]}...; copy or prepare it again"
            )


def _check_dtype(data: IndexedDataset, vocab_size: int | None, sidecar: Sidecar | None, report: VerifyReport) -> None:
    found = data.dtype
    recorded = sidecar.files.get("dtype") if sidecar else None
    if recorded is not None and recorded != found.name:
        report.problems.append(f"{idx_path(data.prefix)} says {found.name}, but the data was prepared as {recorded}")
        return
    if vocab_size is None:
        return
    expected = optimal_dtype(vocab_size)
    if found == expected:
        return
    sentence = f"{data.prefix} holds {found.name}; a vocabulary of {vocab_size} tokens is written as {expected.name}"
    wide_enough = found.name in ("int32", "int64")
    (report.notes if wide_enough else report.problems).append(sentence)


def _check_ids(data: IndexedDataset, vocab_size: int | None, report: VerifyReport) -> None:
    limit = np.iinfo(np.int64).max if vocab_size is None else vocab_size
    if vocab_size is None:
        report.notes.append("no vocabulary size known: only negative ids are looked for")
    highest, wrong, first = -1, 0, None
    for start in range(0, data.num_tokens, _SCAN_TOKENS):
        block = data.tokens[start : start + _SCAN_TOKENS]
        highest = max(highest, int(block.max()))
        if highest < limit and int(block.min()) >= 0:
            continue
        places = np.flatnonzero((block < 0) | (block >= limit))
        wrong += len(places)
        if first is None and len(places):
            first = start + int(places[0])
    report.facts["highest_id"] = highest
    if first is None:
        return
    sequence, offset = data.locate(first)
    document = int(np.searchsorted(data.document_bounds, sequence, side="right")) - 1
    allowed = "negative" if vocab_size is None else f"outside the vocabulary of {vocab_size} tokens"
    report.problems.append(
        f"{wrong} of {data.num_tokens} token ids are {allowed}; the first is {int(data.tokens[first])} in document "
        f"{document}, token {offset}, byte {first * data.dtype.itemsize} of {bin_path(data.prefix)}"
    )


def _check_tokenizer(sidecar: Sidecar, tokenizer: Tokenizer, report: VerifyReport) -> None:
    made, given = sidecar.tokenizer, tokenizer.identity()
    differences = [
        f"{key} {made.get(key)} against {given.get(key)}"
        for key in sorted(made | given)
        if made.get(key) != given.get(key)
    ]
    if differences:
        report.problems.append(
            "the data was made with another tokenizer (prepared with, against given: " + ", ".join(differences) + ")"
        )


def _check_plausible(data: IndexedDataset, tokenizer: Tokenizer, report: VerifyReport) -> None:
    """Decode some sequences and encode them again: another tokenizer hardly ever gives the same ids."""
    if isinstance(tokenizer, NullTokenizer):
        report.notes.append("NullTokenizer fits any ids: whether the data was made with it cannot be checked")
        return
    every = max(1, len(data) // _SAMPLED_DOCUMENTS)
    checked = differing = 0
    for sequence in range(0, len(data), every):
        ids = data.get(sequence)[:_SAMPLED_TOKENS].tolist()
        if ids and ids[-1] == tokenizer.eod_id:
            ids.pop()
        # The end of a cut sequence may be split in another way, so that only its front counts.
        compared = len(ids) if len(ids) < _SAMPLED_TOKENS else len(ids) - 64
        if compared < 2:
            continue
        checked += 1
        differing += tokenizer.tokenize(tokenizer.detokenize(ids))[:compared] != ids[:compared]
    sentence = f"{differing} of {checked} sampled sequences change when they are decoded and encoded again"
    if checked and differing / checked > _MISMATCH_ABOVE:
        report.problems.append(f"{sentence}: the data was probably made with another tokenizer")
    else:
        report.notes.append(f"{sentence} (a check by example, not a proof)")


def summary(report: VerifyReport) -> str:
    """Return the report as lines for a terminal."""
    facts = report.facts
    lines = []
    if facts:
        lines.append(
            f"{report.prefix}: {facts['documents']:,} documents, {facts['sequences']:,} sequences, "
            f"{facts['tokens']:,} tokens, {facts['dtype']}, highest id {facts.get('highest_id')}"
        )
    lines += [f"problem: {sentence}" for sentence in report.problems]
    lines += [f"note: {sentence}" for sentence in report.notes]
    lines.append("verified: no problem found" if report.ok else f"verified: {len(report.problems)} problem(s) found")
    return "\n".join(lines)
