"""The rules of a diagnosis' advice: one table, each rule with its reason and with what it rests on.

A rule looks at facts, which are numbers computed from the sample, and so certain as far as the sample goes. What it
advises is less certain, and its evidence says how much:

- `derived`: follows from the objective's formula. What it does to the quality of a trained model is not in there.
- `reported by users of token-level losses`: others' reports about DFT and its kin, which weigh tokens, not sequences.
- `measured on tinyworld`: our own figures from a made-up corpus and a tiny model.
- `measured on Multi30k`: our own figures from image captions, with and without wrong pairs, and a small model.

The thresholds are rules of thumb of this project. No rule says that an objective will help: that is not known before
training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

DERIVED = "derived"
REPORTED = "reported by users of token-level losses"
MEASURED = "measured on tinyworld"
MEASURED_NOISE = "measured on Multi30k"
EVIDENCE = (DERIVED, REPORTED, MEASURED, MEASURED_NOISE)

TELLS = 0.6
"""From this share of couples on, p̄ is taken to tell right from wrong."""

Facts = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """When the facts are such, say so. `about` is what the facts are of: "data", "objective" or "compare".

    `finding`, `advice` and `reason` are format strings over the facts.
    """

    name: str
    about: str
    when: Callable[[Facts], bool]
    finding: str
    advice: str
    reason: str
    evidence: str


RULES = (
    Rule(
        "few-records",
        "data",
        lambda f: f["num_records"] < 200,
        "The sample has {num_records} records.",
        "Read shares of tenths and the rules below as rough; measure more records if there are more.",
        "A tenth is then fewer than twenty records.",
        DERIVED,
    ),
    Rule(
        "cut-records",
        "data",
        lambda f: f["lost_share"] > 0.05,
        "{lost_share:.0%} of the sample were dropped or cut at max_length = {max_length}.",
        "Raise --max_length, here and in training, as far as the model has positions, or shorten the records.",
        "A cut answer has no end to learn, and its mean log-probability is that of its head.",
        DERIVED,
    ),
    Rule(
        "unknown-data",
        "data",
        lambda f: f["p_bar_median"] < 0.1,
        "Half of the answers have a p̄ below {p_bar_median:.2g}.",
        "Start with an MLE phase, and diagnose again from its checkpoint. Where many records are wrong, compare that "
        "with k = 1 from here.",
        "On right pairs k = 1 lost 0.7 to 0.9 BLEU against going on with MLE from medians of 0.04 and 0.10, and k = 4 "
        "2.4 to 9.4, for what the model does not know yet gets little weight. With 50 % wrong pairs k = 1 gained 1.4 "
        "to 2.3 (0.7 to 1.1 at beam 5) from medians of 0.02 to 0.1, and with 30 % it was ahead from 0.03 on, on "
        "validation. It is no evidence about your model.",
        MEASURED_NOISE,
    ),
    Rule(
        "half-known-data",
        "data",
        lambda f: 0.1 <= f["p_bar_median"] < 0.3,
        "Half of the answers have a p̄ below {p_bar_median:.2g}.",
        "Where most records are right and MLE still gains on validation, go on with it first, before k = 4 above all, "
        "and diagnose again.",
        "On right pairs, from a median of 0.24, k = 1 was 0.3 BLEU behind MLE in greedy search, which may be chance, "
        "and 0.7 at beam 5, k = 4 0.3 and 1.2; from a model on which MLE had stood still neither was behind. It is no "
        "evidence about your model.",
        MEASURED_NOISE,
    ),
    Rule(
        "known-data",
        "data",
        lambda f: f["p_bar_median"] > 0.9,
        "Half of the answers have a p̄ above {p_bar_median:.2g}: the model knows them almost by heart.",
        "Do not expect much of any objective on this data; check that the model was not trained on it already.",
        "Near p̄ = 1 the weight of convex is near 1, as MLE's, and the gradient itself is near 0.",
        DERIVED,
    ),
    Rule(
        "p-bar-tells",
        "data",
        lambda f: f["judged_low"] is not None and f["judged_low"] > TELLS,
        "p̄ ranks a right record above a wrong one in {judged_share:.0%} of couples (95 %: {judged_low:.0%} to "
        "{judged_high:.0%}).",
        "Sequence-level convex with k = 1, or dropping the least likely records before MLE, lets wrong ones go. "
        "Compare both with MLE; dropping more than the share of wrong ones may be better than dropping that share.",
        "With targets exchanged among sources (73 and 83 % of couples) or in the wrong language (81 %) both gained "
        "over MLE, the more the more were wrong; with shuffled words (84 %), which cost MLE little, hardly. It is no "
        "evidence about your model.",
        MEASURED_NOISE,
    ),
    Rule(
        "p-bar-misleads",
        "data",
        lambda f: f["judged_high"] is not None and f["judged_high"] < 0.5,
        "p̄ ranks a right record above a wrong one in only {judged_share:.0%} of couples (95 %: {judged_low:.0%} to "
        "{judged_high:.0%}): the wrong ones are the likely ones.",
        "Use neither a sequence-level weight nor a filter by p̄ on this data. Take the wrong records out by what they "
        "have in common (length, language, text that is copied), or train with MLE.",
        "With half of the targets cut off (33 % of couples) or copied from the source (17 %) both lost against MLE; "
        "the token level gained much on the first and lost on the second.",
        MEASURED_NOISE,
    ),
    Rule(
        "p-bar-is-blind",
        "data",
        lambda f: f["judged_low"] is not None and f["judged_low"] <= TELLS and f["judged_high"] >= 0.5,
        "p̄ ranks a right record above a wrong one in {judged_share:.0%} of couples (95 %: {judged_low:.0%} to "
        "{judged_high:.0%}): it tells them apart badly, or too few were judged to know.",
        "Judge more records, or measure with a better model. Until then expect no cleaning from sequence-level "
        "weights.",
        "A sequence's weight is a function of its p̄ alone.",
        DERIVED,
    ),
    Rule(
        "small-update",
        "objective",
        lambda f: f["family"] == "convex" and f["level"] == "sequence" and f["update_ratio"] < 0.1,
        "Mean weight {update_ratio:.2g} at k = {k:g}.",
        "Start with an MLE phase, or take {k_hint}mle_mix 0.1.",
        "The weight is p̄^k, so what the model finds unlikely is hardly learned. A smaller k (the one named gives a "
        "mean weight of about {wanted:g}) or an MLE share a, which keeps every weight at a or above, keeps it in "
        "play.",
        DERIVED,
    ),
    Rule(
        "small-update-token",
        "objective",
        lambda f: f["family"] == "convex" and f["level"] == "token" and f["update_ratio"] < 0.4,
        "Mean token weight {update_ratio:.2g} at k = {k:g}.",
        "Start with an MLE phase or a smaller k, and judge by plain NLL and by the task, not by the loss.",
        "Users of DFT report losses near 0 with tiny gradients, a rising plain NLL, and results below SFT (or below "
        "the model they started from) with hyper-parameters left as they were; others report gains.",
        REPORTED,
    ),
    Rule(
        "few-carry",
        "objective",
        lambda f: f["ess"] < 0.3,
        "The weights are as uneven as if {ess:.0%} of the {units} carried the gradient, equally, and the others none.",
        "Take {gentler} or mle_mix, or larger batches; a larger learning rate does not mend it.",
        "A larger step scales all weights alike; the effective sample size (Σw)²/(nΣw²) stays as it is, and with it "
        "the noise of a batch's gradient.",
        DERIVED,
    ),
    Rule(
        "learning-rate",
        "objective",
        lambda f: f["update_ratio"] < 0.5,
        "The update is about {update_ratio:.2g} times MLE's in size (the mean weight).",
        "With plain SGD divide the learning rate by that number, down to a tenth; below that mend the weights first. "
        "With Adam or AdamW leave it at first: a constant factor on the gradient drops out of their steps. Tune it "
        "for each objective before comparing them.",
        "The step of SGD is proportional to the gradient; Adam divides it by its own running size, up to epsilon. "
        "The ratio is exact only if the records' gradients are alike.",
        DERIVED,
    ),
    Rule(
        "clipping",
        "objective",
        lambda f: f["update_ratio"] < 0.5,
        "Gradients are about {update_ratio:.2g} times as long as MLE's.",
        "A max_grad_norm that clips MLE now and then will hardly clip here; to clip as often, multiply it by that "
        "number, and look at the logged grad_norm.",
        "Clipping compares the gradient's length with a fixed number.",
        DERIVED,
    ),
    Rule(
        "large-weights",
        "objective",
        lambda f: f["family"] == "power" and (f["weight_max"] > 5 or f["update_ratio"] > 2),
        "Weights reach {weight_max:.3g} (mean {update_ratio:.2g}), on the {units} that the model is surest of.",
        "Take a k nearer to 1, keep gradient clipping on, or lower the learning rate.",
        "The weight of power, (-m)^(k-1), grows without end as p̄ nears 1, up to a bound set for numerical reasons.",
        DERIVED,
    ),
    Rule(
        "get-nothing",
        "objective",
        lambda f: f["nothing_share"] > 0.02,
        "{nothing_count} records ({nothing_share:.0%}) get a weight below {nothing_below:g}: they are passed over.",
        "Read the most neglected records. If they are wrong, that is what the objective is for; if they are what you "
        "want learned, take {gentler}, mle_mix or an MLE phase.",
        "Unlikely to the model may mean wrong, or merely new. The weight cannot tell one from the other.",
        DERIVED,
    ),
    Rule(
        "starved-source",
        "objective",
        lambda f: f["starved_source"] is not None,
        "Records from `{starved_source}` get {starved_share:.1%} of the gradient; MLE gives them "
        "{starved_mle_share:.1%}.",
        "If that part of the data matters, give it an MLE phase, mle_mix, or a larger record weight.",
        "The weights compare records with each other over the whole data, so sources that the model knows less well "
        "lose to those it knows better.",
        DERIVED,
    ),
    Rule(
        "length-weighting",
        "objective",
        lambda f: f["length_moved"] > 0.15,
        "Token and sequence length weighting disagree about where {length_moved:.0%} of the gradient goes.",
        "Choose length_weighting deliberately: `sequence` moves gradient from long answers to short ones.",
        "With `sequence` an answer's tokens share one vote; with `token` each has its own.",
        DERIVED,
    ),
    Rule(
        "collapse",
        "objective",
        lambda f: f["level"] == "sequence" and bool(f["collapsed"]),
        "{collapsed} records have at most k = {k:g} target tokens (the shortest has {shortest}).",
        "Keep k below the shortest lengths that should keep more than one answer, or use mle_mix.",
        "From k = T on the exact optimum over answers of T tokens is one answer alone, and training may settle on a "
        "wrong one.",
        DERIVED,
    ),
    Rule(
        "one-hot-tokens",
        "objective",
        lambda f: f["family"] == "convex" and f["level"] == "token" and f["k"] >= 1 and not f["mle_mix"],
        "At token level with k = {k:g} the exact optimum gives every next token all its probability.",
        "Expect little diversity in sampled text; a k below 1 keeps some.",
        "A token is a sequence of length 1, and from k = T on the optimum is one-hot.",
        DERIVED,
    ),
    Rule(
        "no-sharpening",
        "objective",
        lambda f: f["exponent_median"] is not None and f["exponent_median"] < 1.05 and not f["collapsed"],
        "At the data's lengths the optimum is the data's distribution to the power {exponent_median:.3f} (median).",
        "Look for the effect in which records get gradient (the tenths), not in a sharper optimum.",
        "The exponent is 1/(1 - k/T), which is near 1 for T far above k.",
        DERIVED,
    ),
    Rule(
        "new-end-token",
        "objective",
        lambda f: f["level"] == "token" and f["family"] != "mle" and f["end_p"] is not None and f["end_p"] < 0.1,
        "The model gives the end of an answer a probability of {end_p:.2g} (geometric mean), and that is its "
        "weight's base.",
        "Train with MLE until answers end, or use mle_mix; otherwise test for answers that run on.",
        "Users of DFT report end tokens that are not learned, and repetition without end.",
        REPORTED,
    ),
    Rule(
        "nothing-against",
        "objective",
        lambda f: (
            f["family"] == "convex"
            and f["level"] == "sequence"
            and f["update_ratio"] >= 0.3
            and f["ess"] >= 0.5
            and f["nothing_share"] <= 0.02
        ),
        "Mean weight {update_ratio:.2g}, effective sample size {ess:.0%}: most records keep a part in the gradient.",
        "Nothing in the weights speaks against trying it. Whether it helps, a comparison with MLE has to show.",
        "On a made-up corpus a tiny model already trained with MLE gained 3.5 (k = 1) and 4.4 (k = 3) BLEU over "
        "further MLE in greedy search, and nothing at beam 5. That is no evidence about your model.",
        MEASURED,
    ),
    Rule(
        "given-up",
        "compare",
        lambda f: f["lowest_rise"] > 0.1,
        "In the tenth that was least likely before, the NLL rose by {lowest_rise:.2f} to {lowest_after:.2f} nats a "
        "token.",
        "Read those records. If they are wanted, take a k nearer to MLE, mle_mix or a stage of MLE.",
        "They had the smallest weights; what is gained on likely answers is taken from them.",
        DERIVED,
    ),
    Rule(
        "forgetting",
        "compare",
        lambda f: f["worse_tenths"] >= 3 or f["nll_rise"] > 0.05,
        "The NLL rose in {worse_tenths} of {tenths} tenths (in all by {nll_rise_said} nats a token).",
        "Do not read it as failure alone (a sharper model has a higher NLL); decode a test set and compare scores.",
        "Users of DFT report a plain NLL that rises while the loss falls.",
        REPORTED,
    ),
)
