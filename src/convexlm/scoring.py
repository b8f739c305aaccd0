"""Scores that can be cited: hypotheses and references in, sacreBLEU and ROUGE numbers with signatures out.

The numbers are those of sacreBLEU's metric classes and of rouge-score, in full precision. What is added is what
makes them safe to use: which tokenizer a target language gets (an error where it is not installed, never another
one), streams that must be of one length, and the hashes of what was scored.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import text_sha256
from convexlm.packages import package_version
from convexlm.segments import check_lengths
from convexlm.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np

    # (target language, tokenizer or None, reference streams) -> a sacreBLEU `Metric` with its references cached
    Builder = Callable[[str, str | None, Sequence[Sequence[str]]], Any]

DEFAULT_METRICS = ("bleu", "chrf")
DEFAULT_SEED = 12345  # sacreBLEU's own
# Codes that people write for languages with a tokenizer of their own; sacreBLEU would give them 13a and say nothing.
_OTHER_CODES = {"zho": "zh", "chi": "zh", "cmn": "zh", "cn": "zh", "jpn": "ja", "jp": "ja", "kor": "ko"}
# Languages without blanks between words that sacreBLEU chooses no tokenizer for, and what may be given instead.
_NO_BLANKS = {
    **dict.fromkeys(("bo", "dz", "km", "lo", "my", "th"), "flores200 or char"),
    **dict.fromkeys(("gan", "lzh", "wuu", "yue"), "zh"),
}


@dataclass(frozen=True)
class MetricKind:
    """A registered metric: how it is called in print, whether more is better, and what builds it."""

    name: str
    title: str
    higher_is_better: bool
    build: Builder


METRICS: dict[str, MetricKind] = {}


def register_metric(name: str, *, title: str, higher_is_better: bool = True) -> Callable[[Builder], Builder]:
    """Register a function `(target_lang, tokenize, references) -> sacrebleu Metric` as the metric `name`."""

    def register(builder: Builder) -> Builder:
        METRICS[name] = MetricKind(name, title, higher_is_better, builder)
        return builder

    return register


def get_metric(name: str) -> MetricKind:
    """The registered metric `name`.

    Raises:
        UserError: there is no such metric (the message lists those there are).
    """
    if name not in METRICS:
        raise UserError(f"unknown metric `{name}`; known: {', '.join(METRICS)}")
    return METRICS[name]


@register_metric("bleu", title="BLEU")
def _bleu(target_lang: str, tokenize: str | None, references: Sequence[Sequence[str]]) -> Any:
    from sacrebleu.metrics import BLEU

    if tokenize is not None and tokenize not in BLEU.TOKENIZERS:
        raise UserError(f"unknown tokenizer `{tokenize}`; sacreBLEU has: {', '.join(BLEU.TOKENIZERS)}")
    try:
        # A tokenizer that was asked for needs no advice about the language's own.
        return BLEU(trg_lang="" if tokenize else target_lang, tokenize=tokenize, references=references)
    except (ImportError, RuntimeError, AssertionError, OSError, SystemExit) as error:
        wanted = tokenize or f"{target_lang}-mecab"
        extra = {"ja-mecab": "ja", "ko-mecab": "ko"}.get(wanted)
        if extra:
            hint = f"pip install 'sacrebleu[{extra}]'"
        else:
            hint = f"sacreBLEU downloads its model on first use ({type(error).__name__}: {error})"
        raise UserError(f"the tokenizer `{wanted}` is not at hand: {hint}") from None


@register_metric("chrf", title="chrF")
def _chrf(target_lang: str, tokenize: str | None, references: Sequence[Sequence[str]]) -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF(references=references)


@register_metric("chrf++", title="chrF++")
def _chrf_plus_plus(target_lang: str, tokenize: str | None, references: Sequence[Sequence[str]]) -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF(word_order=2, references=references)


@register_metric("ter", title="TER", higher_is_better=False)
def _ter(target_lang: str, tokenize: str | None, references: Sequence[Sequence[str]]) -> Any:
    from sacrebleu.metrics import TER

    # Without its Asian support, TER takes a whole Chinese or Japanese sentence for one word. The signature says it.
    asian = target_lang in ("zh", "ja")
    return TER(normalized=asian, asian_support=asian, references=references)


def _register_rouge(name: str, title: str) -> None:
    @register_metric(name, title=title)
    def build(target_lang: str, tokenize: str | None, references: Sequence[Sequence[str]]) -> Any:
        from convexlm.rouge import Rouge

        # rouge-score's stemmer is an English one.
        return Rouge(name, stemmer=target_lang == "en", references=references)


_register_rouge("rouge1", "ROUGE-1")
_register_rouge("rouge2", "ROUGE-2")
_register_rouge("rougeLsum", "ROUGE-Lsum")


@dataclass(frozen=True)
class Score:
    """One corpus-level score and all that is needed to cite and to reproduce it.

    Attributes:
        metric: the registered name, such as `bleu`.
        score: the score in full precision, on the metric's own scale (0 to 100 but for TER, which can be more).
        signature: sacreBLEU's signature (for ROUGE, one of ours in the same notation).
        num_sentences: segments scored.
        num_empty: hypotheses without any text among them; they are scored as such.
        hypotheses_sha256: `files.text_sha256` of the hypotheses.
        references_sha256: the same of every reference stream.
        details: the metric's parts; for BLEU `bp`, `ratio`, `hyp_len`, `ref_len`, `precisions`.
        mean: mean over bootstrap resamples, where asked for.
        ci: half-width of the 95 % interval around `mean`, where asked for.
        versions: of the packages that made the score.
    """

    metric: str
    score: float
    signature: str
    num_sentences: int
    num_empty: int
    hypotheses_sha256: str
    references_sha256: list[str]
    details: dict[str, Any] = field(default_factory=dict)
    mean: float | None = None
    ci: float | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The score as a JSON-ready object; `mean` and `ci` only where they were asked for."""
        return {key: value for key, value in asdict(self).items() if key not in ("mean", "ci") or value is not None}


class Scorer:
    """Scores any number of systems against one set of references, whose n-grams are counted once.

    So are those of every system: scores, intervals and tests that share a scorer share its sentence statistics, which
    it keeps for as long as it lives (a few dozen numbers a sentence and metric).

    Args:
        references: reference streams, all of one length.
        target_lang: the language code of the references, which chooses BLEU's tokenizer.
        metrics: registered names.
        tokenize: a sacreBLEU tokenizer to use for BLEU instead; the signature names it.

    Raises:
        UserError: a malformed language, an unknown or repeated metric, a tokenizer that is unknown or not installed,
            no references, or references of different length.
    """

    def __init__(
        self,
        references: Sequence[Sequence[str]],
        target_lang: str,
        metrics: Sequence[str] = DEFAULT_METRICS,
        *,
        tokenize: str | None = None,
    ) -> None:
        if isinstance(references, str) or any(isinstance(stream, str) for stream in references):
            raise ValueError("references must be a list of streams: [[first line, second line, ...], ...]")
        check_language(target_lang)
        check_lengths({f"reference {number}": stream for number, stream in enumerate(references, start=1)})
        if repeated := {name for name in metrics if list(metrics).count(name) > 1}:
            raise UserError(f"metric `{min(repeated)}` is given twice")
        if tokenize is not None and "bleu" not in metrics:
            raise UserError(
                f"--tokenize {tokenize} is for BLEU, which is not among the metrics ({', '.join(metrics)})"
            )
        self.target_lang = target_lang
        self.references = [list(stream) for stream in references]
        self.references_sha256 = [text_sha256(stream) for stream in references]
        given = _with_gaps(self.references)
        self.metrics = {name: get_metric(name).build(target_lang, tokenize, given) for name in metrics}
        for metric in self.metrics.values():
            _remember(metric)

    def score(
        self, hypotheses: Sequence[str], *, confidence: int = 0, seed: int = DEFAULT_SEED, label: str = "hypotheses"
    ) -> list[Score]:
        """Score one system with every metric.

        Args:
            hypotheses: one a segment, in the references' order.
            confidence: the number of bootstrap resamples for a 95 % interval; 0 for none.
            seed: of the resampling.
            label: what to call the hypotheses in an error, such as their file's name.

        Raises:
            UserError: hypotheses and references differ in number.
        """
        check_lengths({label: hypotheses, "reference 1": self.references[0]})
        if confidence < 0 or confidence == 1:
            raise ValueError("confidence must be 0 or a number of resamples above 1")
        hypotheses = list(hypotheses)
        common: dict[str, Any] = {
            "num_sentences": len(hypotheses),
            "num_empty": count_empty(hypotheses),
            "hypotheses_sha256": text_sha256(hypotheses),
            "references_sha256": list(self.references_sha256),
        }
        scores = []
        for name, metric in self.metrics.items():
            metric.n_bootstrap = metric.seed = None  # a plain score after one with an interval
            with sacrebleu_seed(seed):
                result = metric.corpus_score(hypotheses, None, n_bootstrap=confidence or 1)
            scores.append(
                Score(
                    metric=name,
                    score=float(result.score),
                    signature=str(metric.get_signature()),
                    details=_details(result),
                    versions=package_versions(name),
                    mean=float(result._mean) if confidence else None,
                    ci=float(result._ci) if confidence else None,
                    **common,
                )
            )
        return scores


def score_corpus(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    target_lang: str,
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    tokenize: str | None = None,
    confidence: int = 0,
    seed: int = DEFAULT_SEED,
) -> list[Score]:
    """Score one system; see `Scorer` (better for several on the same references) for arguments and errors."""
    scorer = Scorer(references, target_lang, metrics, tokenize=tokenize)
    return scorer.score(hypotheses, confidence=confidence, seed=seed)


def sentence_statistics(metric: Any, hypotheses: Sequence[str]) -> np.ndarray:
    """Sufficient statistics of every segment: (sentences, statistics) float64; they add up over sentences.

    This and `score_from_statistics` are where we use what sacreBLEU does not call public; a test holds both to its
    public results.
    """
    import numpy as np

    return np.asarray(metric._extract_corpus_statistics(list(hypotheses), None), dtype=np.float64)


def _with_gaps(references: Sequence[Sequence[str]]) -> list[list[Any]]:
    """The streams with None where a segment has no text in one of them but in another.

    sacreBLEU passes over None (`nrefs:var`). An empty text it takes for a reference of no words, as long as a short
    hypothesis likes: BLEU's brevity penalty and TER's mean length would go by it.
    """
    rows = [
        [text if text.strip() else None for text in texts] if any(text.strip() for text in texts) else list(texts)
        for texts in zip(*references, strict=True)
    ]
    return [list(stream) for stream in zip(*rows, strict=True)]


def first_references(references: Sequence[Sequence[str]]) -> list[str]:
    """Of every segment the first reference with text, for what takes a single one; empty where none has any."""
    return [next(filter(str.strip, texts), "") for texts in zip(*references, strict=True)]


def _remember(metric: Any) -> None:
    """Have a sacreBLEU metric keep the sentence statistics of every list of hypotheses that it has seen."""
    extract, kept = metric._extract_corpus_statistics, {}

    def remembered(hypotheses: Sequence[str], references: Any) -> Any:
        if references is not None:
            return extract(hypotheses, references)
        key = text_sha256([str(len(hypotheses)), *hypotheses])
        if key not in kept:
            kept[key] = extract(hypotheses, None)
        # sacreBLEU turns the outer list into an array, and adds nothing to it; a copy costs nothing and is safe.
        return list(kept[key])

    metric._extract_corpus_statistics = remembered


def score_from_statistics(metric: Any, totals: np.ndarray) -> float:
    """The corpus score that belongs to summed statistics (statistics,)."""
    return float(metric._compute_score_from_stats(totals.tolist()).score)


def check_language(code: str) -> None:
    """See that `code` is a bare language code such as `de` or `zh`.

    Raises:
        UserError: it is empty, a pair, not in lower case, or another name for a language that has a tokenizer.
    """
    if not re.fullmatch(r"[a-z]{2,3}", code):
        raise UserError(f"target language {code!r}: expected a code of two or three small letters, such as de or zh")
    if code in _OTHER_CODES:
        raise UserError(f"target language `{code}`: write `{_OTHER_CODES[code]}`, which sacreBLEU has a tokenizer for")


def said_of_words(target_lang: str, metrics: Sequence[str], tokenize: str | None = None) -> str:
    """What to tell where a metric counts words in a language whose words have no blanks between them; else empty.

    The number is sacreBLEU's for that language, and takes whole phrases for words.
    """
    concerned = [name for name in metrics if name == "ter" or (name == "bleu" and tokenize is None)]
    if target_lang not in _NO_BLANKS or not concerned:
        return ""
    titles = " and ".join(get_metric(name).title for name in concerned)
    hint = f", or give `convexlm score` --tokenize {_NO_BLANKS[target_lang]} for BLEU" if "bleu" in concerned else ""
    return (
        f"  `{target_lang}` has no blanks between words, and sacreBLEU no tokenizer that is chosen for it: {titles} "
        f"take{'' if len(concerned) > 1 else 's'} what stands between blanks for a word; go by chrF{hint}"
    )


def count_empty(hypotheses: Sequence[str]) -> int:
    """How many hypotheses hold no text but blanks."""
    return sum(1 for line in hypotheses if not line.strip())


@contextlib.contextmanager
def sacrebleu_seed(seed: int) -> Iterator[None]:
    """Let sacreBLEU resample from `seed`; it takes its seed from the environment, which is put back after."""
    if seed < 0:
        raise UserError(f"the seed must not be negative, it is {seed}")
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = before


def package_versions(metric: str) -> dict[str, str]:
    """The versions of the packages that a metric's score comes from."""
    package = "rouge-score" if metric.startswith("rouge") else "sacrebleu"
    return {"convexlm": __version__, package: package_version(package)}


def _details(result: Any) -> dict[str, Any]:
    """What sacreBLEU's result holds beside the score."""
    if hasattr(result, "bp"):
        return {
            "bp": float(result.bp),
            "ratio": float(result.ratio),
            "hyp_len": int(result.sys_len),
            "ref_len": int(result.ref_len),
            "precisions": [float(value) for value in result.precisions],
        }
    if hasattr(result, "num_edits"):
        return {"num_edits": int(result.num_edits), "ref_len": float(result.ref_length)}
    return {}
