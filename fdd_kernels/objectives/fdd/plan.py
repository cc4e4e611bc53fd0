"""The plan of one FDD call: its requests and pair moments, and where each term is found in them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fdd_kernels.backends import resolve_backend
from fdd_kernels.lens import divergences
from fdd_kernels.lens.distances import DISTANCES
from fdd_kernels.lens.divergence_text import NamedDivergence, parse_divergence
from fdd_kernels.lens.spec import NLL, Layers, LensSpec, PairMoments, Request
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.inputs import LossInputs
from fdd_kernels.objectives.numbers import check_numbers
from fdd_kernels.objectives.validation import (
    check_feature_options,
    check_num_items,
    check_shift,
    check_tensors,
    check_tokens,
    check_transforms,
    compared_tokens,
)


@dataclass(frozen=True)
class Plan:
    """What one call computes, and where each term is found among the statistics.

    `student_layers` and `teacher_layers` are positions among the hidden states given; `spec` counts
    within them. A term is one index into `spec.requests` or `spec.moments`, or one per pair of
    layers or of deltas; None or empty if it is not computed.
    """

    options: LossOptions
    backend: str
    feature_space: bool
    leading_shape: tuple[int, ...]
    student_layers: tuple[int, ...]
    teacher_layers: tuple[int, ...]
    spec: LensSpec
    output_kd: int | None
    ce: int | None
    trajectory: tuple[int, ...]
    # Of its pairs of layers, whose weighted sum it is, without those of 0; empty for their mean.
    trajectory_weights: tuple[float, ...]
    derivative: tuple[int, ...]
    # Per pair of deltas, the requests with their layers' log-sum-exps; empty where they need none.
    derivative_requests: tuple[tuple[int, int], ...]


def make_plan(options: LossOptions, inputs: LossInputs) -> tuple[Plan, LossInputs]:
    """Check every argument before any work, and decide what is computed.

    Returns the plan, and the tensors with the hidden states as tuples.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.
        RuntimeError: the backend asked for cannot run here.
    """
    inputs = check_tensors(inputs, paired=not options.pairs_all_layers)
    _check_space(options, inputs)
    columns = compared_tokens(inputs, options.vocab_size)
    check_tokens(inputs)
    if options.ce_weight and inputs.labels is None:
        raise ValueError(f"ce_weight={options.ce_weight} needs labels: pass labels, or ce_weight=0")
    check_shift(options.shift, inputs.labels)
    check_num_items(options.reduction, inputs.num_items_in_batch)
    plan = build_plan(
        options,
        columns,
        len(inputs.student_hidden),
        len(inputs.teacher_hidden),
        leading_shape=inputs.leading_shape,
        feature_space=inputs.feature_space,
    )
    plan = replace(plan, backend=resolve_backend(options.backend, inputs.device, plan.spec))
    check_transforms(inputs, plan.backend)
    check_numbers(inputs)
    return plan, inputs


def build_plan(
    options: LossOptions,
    columns: int,
    states: int,
    teacher_states: int | None = None,
    *,
    leading_shape: tuple[int, ...] = (),
    feature_space: bool = False,
    backend: str = "torch",
) -> Plan:
    """Turn options into requests and pair moments; work of weight 0 is left out.

    Args:
        columns: tokens of the vocabulary (features in feature space) that are compared.
        states: hidden states of the student, the final one included.
        teacher_states: of the teacher; None: as many.

    Raises:
        ValueError: nothing is left to compute, or `layer_weights` or `derivative_layers` of another
            number of layers.
    """
    final = Layers(states - 1, (states if teacher_states is None else teacher_states) - 1)
    builder = _SpecBuilder()
    pairs = options.layer_pairs(*[layer + options.output_in_dynamics for layer in final])
    deltas = [Layers(*ends) for ends in enumerate(pairs.derivative)]
    weights = {Layers(i, j): weight for i, j, weight in pairs.weighted() if options.alpha}
    distance, temperature = None, options.temperature_of_deltas
    if options.beta and options.derivative is not None:
        distance = DISTANCES[options.derivative]
    needs_lse = distance is not None and not feature_space and not distance.centred
    # The derivative takes them of the trajectory's requests.
    shares_lse = needs_lse and temperature == options.temperature and options.teacher_mix == 1
    shares_lse = shares_lse and len(deltas) > 1
    trajectory: list[int] = []
    trajectory_weights: list[float] = []
    # The derivative's first: their log-sum-exps are a run of requests, in the order of layers.
    for pair in dict.fromkeys([*deltas, *weights]):
        weight = weights.get(pair)
        if weight:
            trajectory_weights.append(weight)
        if options.trajectory in DISTANCES:
            if weight:
                trajectory.append(builder.moments_of(None, pair, options.temperature))
        elif weight:
            divergence = parse_divergence(options.trajectory), options.teacher_mix
            trajectory.append(builder.request(pair, options.temperature, *divergence))
        elif shares_lse:
            builder.request(pair, temperature, None)
    derivative: list[int] = []
    derivative_requests: list[tuple[int, int]] = []
    if distance is not None:
        for ends in zip(deltas, deltas[1:]):
            derivative.append(builder.moments_of(*ends, temperature, distance.weighted))
            if needs_lse:
                of_pair = [builder.request(layers, temperature, None) for layers in ends]
                derivative_requests.append(tuple(of_pair))
    output_kd = ce = None
    if options.output_kd_weight and not feature_space:
        divergence = parse_divergence(options.output_divergence), options.teacher_mix
        output_kd = builder.request(final, options.output_temperature, *divergence)
    if options.ce_weight:
        ce = builder.request(final, 1.0, NamedDivergence(NLL))
    if distance is not None and distance.weighted and not builder.requests:
        # Without a request the shifts, which weights are relative to, are not near the logits.
        for layers in deltas[1:]:
            builder.request(layers, temperature, None)
    if not (builder.requests or builder.moments):
        raise ValueError(
            f"nothing to compute: {states} hidden state(s) with "
            f"output_in_dynamics={options.output_in_dynamics}, alpha={options.alpha}, "
            f"layer_weights={options.layer_weights}, "
            f"beta={options.beta}, derivative={options.derivative!r}, "
            f"output_kd_weight={options.output_kd_weight}, ce_weight={options.ce_weight}: give a "
            "term a weight, or more layers"
        )
    layers = builder.layers()
    return Plan(
        options=options,
        backend=backend,
        feature_space=feature_space,
        leading_shape=leading_shape,
        student_layers=layers[0],
        teacher_layers=layers[1],
        spec=builder.spec(options, columns, *layers),
        output_kd=output_kd,
        ce=ce,
        trajectory=tuple(trajectory),
        trajectory_weights=() if options.layer_weights is None else tuple(trajectory_weights),
        derivative=tuple(derivative),
        derivative_requests=tuple(derivative_requests),
    )


class _SpecBuilder:
    """Collects requests and pair moments, each once."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.moments: list[PairMoments] = []

    def request(
        self,
        layers: Layers,
        temperature: float,
        divergence: NamedDivergence | None,
        teacher_mix: float = 1.0,
    ) -> int:
        """Return the index of a request; None asks for the log-sum-exps alone."""
        name, parameters = divergence or (None, ())
        request = Request(*layers, temperature, name, parameters, teacher_mix)
        if divergence is None:
            # Any other request of these layers and temperature that looks at both models has them.
            for index, other in enumerate(self.requests):
                has_both = other.divergence != NLL and other.teacher_mix == 1
                if other[:3] == request[:3] and has_both:
                    return index
        if request not in self.requests:
            self.requests.append(request)
        return self.requests.index(request)

    def moments_of(
        self, first: Layers | None, second: Layers, temperature: float, weighted: bool = False
    ) -> int:
        """Return the index of the moments of a pair of deltas, or of layers' own logits."""
        pair = PairMoments(first, second, temperature, weighted)
        if pair not in self.moments:
            self.moments.append(pair)
        return self.moments.index(pair)

    def layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """List the layers of student and teacher that are looked at, in depth order.

        Where each layer of the student has a single layer of the teacher, these are listed one for
        one, some perhaps twice: every backend computes pairs by rank.
        """
        pairs = [request[:2] for request in self.requests]
        pairs += [layers for pair in self.moments for layers in pair.layers]
        students = sorted({student for student, _ in pairs})
        teachers = [sorted({t for s, t in pairs if s == student}) for student in students]
        if max([len(of_student) for of_student in teachers]) == 1:
            return tuple(students), tuple([of_student[0] for of_student in teachers])
        return tuple(students), tuple(sorted({teacher for _, teacher in pairs}))

    def spec(
        self,
        options: LossOptions,
        columns: int,
        students: tuple[int, ...],
        teachers: tuple[int, ...],
    ) -> LensSpec:
        """Return the spec, whose layers count within those of `layers`."""

        def place(pair: Layers | None) -> Layers | None:
            if pair is None:
                return None
            at = students.index(pair.student)
            by_rank = teachers[at : at + 1] == (pair.teacher,)
            return Layers(at, at if by_rank else teachers.index(pair.teacher))

        requests = [
            Request(*place(Layers(*request[:2])), *request[2:]) for request in self.requests
        ]
        return LensSpec(
            columns=columns,
            requests=tuple(requests),
            moments=tuple(
                [m._replace(first=place(m.first), second=place(m.second)) for m in self.moments]
            ),
            student_logit_scale=options.student_logit_scale,
            student_softcap=options.student_softcap,
            teacher_logit_scale=options.teacher_logit_scale,
            teacher_softcap=options.teacher_softcap,
        )


def _check_space(options: LossOptions, inputs: LossInputs) -> None:
    """Refuse options that have no meaning in feature space."""
    if not inputs.feature_space:
        return
    check_feature_options(
        options,
        (
            "student_softcap",
            "teacher_softcap",
            "student_logit_scale",
            "teacher_logit_scale",
            "temperature",
            "derivative_temperature",
            "output_temperature",
            "output_divergence",
            "teacher_mix",
        ),
    )
    if options.ce_weight:
        raise ValueError(
            f"ce_weight={options.ce_weight} needs logits: pass teacher_weight, or ce_weight=0"
        )
    if options.beta and options.derivative and DISTANCES[options.derivative].weighted:
        raise ValueError(
            f"derivative={options.derivative!r} weighs tokens by the teacher's probabilities, but "
            "teacher_weight=None means feature space: pass another derivative, or a teacher_weight"
        )
    if options.alpha and options.trajectory not in DISTANCES:
        names = divergences.FEATURE_DISTANCES
        raise ValueError(
            f"trajectory={options.trajectory!r} compares distributions, but teacher_weight=None "
            f"means feature space: pass one of {', '.join(map(repr, names))}, or a teacher_weight"
        )
    if len(inputs.student_hidden) == 1 and not options.output_in_dynamics:
        raise ValueError(
            "in feature space (teacher_weight=None) the last hidden state alone leaves nothing to "
            "compare: pass the sampled layers before it, or output_in_dynamics=True"
        )
