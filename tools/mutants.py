"""Planted mistakes: wrong rules, wrong emissions, wrong collectives, guards that do not look, wrong prices. The tests must notice each of them.

`old` occurs exactly once in `file`. `tests` are the few files (or tests) of the suite that should notice, the likeliest first;
`check_rules cat view` stands for the rules of these operators, which `tests/partitioner/test_rules.py` checks with all others.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One textual change of the package and the tests that are run with it.

    `harmless`: why no test can notice it, for one that changes nothing that matters.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    harmless: str = ""


LOCALISE = ("tests/passes/test_localise.py", "tests/passes/test_emit.py")
EMIT = ("tests/passes/test_emit.py", "tests/partitioner/test_chains.py", "check_rules sum mean view cat")
ATTEND = ("tests/passes/test_attend.py",)
RING = ("tests/runtime/test_ring.py",)
SPLIT = "tests/partitioner/test_split_keys.py"
KERNEL = ("tests/runtime/test_attention.py", "tests/runtime/test_ring.py")
LAYOUT = ("tests/runtime/test_layout.py", "tests/runtime/test_ulysses.py")
ULYSSES = ("tests/runtime/test_ulysses.py",)
HALO = ("tests/runtime/test_halo.py",)
LENGTHS = ("tests/partitioner/test_lengths.py", "tests/partitioner/test_layout.py", "tests/test_symbolic.py::test_one_partition_serves_three_resolutions")
ATOMS = ("tests/partitioner/test_atoms.py", "tests/partitioner/test_infer.py")
RECOGNISE = ("tests/passes/test_recognise.py",)
REPLAY = ("tests/test_respecialise.py", "tests/passes/test_replay.py")
SEALED = ("tests/passes/test_seal.py",)
STRIDED = ("tests/passes/test_strided.py",)
SHIFT = ("tests/passes/test_relative_shift.py",)
SYMBOLIC = ("tests/test_symbolic.py::test_lengths_shorter_than_the_ranks_do_not_fit_the_program", "tests/passes/test_trace.py")
MODULE = ("tests/test_module.py::test_the_cache_is_bounded", "tests/test_module.py::test_autograd_inference_mode_and_autocast", "tests/test_respecialise.py")
RIDERS = ("tests/partitioner/test_riders.py",)
DIVISION = ("tests/partitioner/test_division.py",)
BYTES = ("tests/partitioner/test_exchange_bytes.py",)
BALANCE = ("tests/partitioner/test_balance.py",)
TIMELINE = ("tests/passes/test_timeline.py",)
TURNS = ("tests/partitioner/test_turns.py",)
WRITTEN = ("tests/partitioner/test_written.py",)
PADDED = ("tests/passes/test_padded_encoder.py",)
BY_TOKEN = ("tests/passes/test_by_token.py",)

RULE_MUTANTS = (
    Mutant("cat puts its parts in reverse order", "partitioner/rules/parts.py", "(tuple(a for f in factors for a in f),)", "(tuple(a for f in factors[::-1] for a in f),)", ("check_rules cat", "tests/partitioner/test_infer.py", "tests/partitioner/test_chains.py")),
    Mutant("permute is inverted", "partitioner/rules/view.py", "op.carry(0, dim % op.rank(), out_dim)", "op.carry(0, out_dim, dim % op.rank())", ("check_rules permute", "tests/partitioner/test_infer.py", "tests/partitioner/test_chains.py")),
    Mutant("transpose moves nothing", "partitioner/rules/view.py", "order[a], order[b] = order[b], order[a]", "pass", ("check_rules transpose", "tests/partitioner/test_infer.py", "tests/partitioner/test_chains.py")),
    Mutant("expand aligns left", "partitioner/rules/view.py", "offset = len(op.out_shape) - op.rank()\n    for dim in range(op.rank()):\n        op.carry", "offset = 0\n    for dim in range(op.rank()):\n        op.carry", ("check_rules expand", "tests/partitioner/test_infer.py", "tests/partitioner/test_chains.py")),
    Mutant("merged dims may share atoms", "partitioner/rules/view.py", "if seen & set(factor):", "if False:", ("tests/partitioner/test_infer.py",)),
    Mutant("broadcasting aligns left", "partitioner/rules/pointwise.py", "offset = out_rank - op.rank(operand)", "offset = 0", ("check_rules add mul where", "tests/partitioner/test_infer.py", "tests/partitioner/test_chains.py")),
    Mutant("a maximum is summed over ranks", "partitioner/rules/reduce.py", 'reduction(op, "max")', 'reduction(op, "sum")', ("check_rules amax max", "tests/partitioner/test_infer.py", "tests/partitioner/test_chains.py")),
    Mutant("a minimum is the largest over ranks", "partitioner/rules/reduce.py", 'reduction(op, "min")', 'reduction(op, "max")', ("check_rules amin min", "tests/partitioner/test_infer.py", "tests/partitioner/test_chains.py")),
    Mutant("a layer norm is computed in parts of its width", "partitioner/rules/norm.py", "skip=tuple(range(op.rank(x) - width, op.rank(x)))", "skip=()", ("check_rules layer_norm", "tests/partitioner/test_infer.py", "tests/partitioner/test_chains.py")),
    Mutant("a linear layer takes parts of its width", "partitioner/rules/matmul.py", "op.carry_all(x, skip=(-1,))", "op.carry_all(x)", ("check_rules linear", "tests/partitioner/test_infer.py", "tests/partitioner/test_chains.py")),
    Mutant("addmm flows from its contraction", "partitioner/rules/matmul.py", "for dim in range(op.rank(a) - 1):", "for dim in range(op.rank(a)):", ("check_rules addmm", "tests/partitioner/test_infer.py", "tests/partitioner/test_chains.py")),
    Mutant("positions are numbered from zero on every rank", "partitioner/rules/create.py", "op.whole = set(range(len(op.out_shape)))", 'op.rewrite = Rewrite("sizes", arg=0)', ("check_rules arange linspace", "tests/partitioner/test_infer.py", "tests/partitioner/test_chains.py")),
    Mutant("stack shifts no dim", "partitioner/rules/parts.py", "op.carry(operand, d, d + (d >= at))", "op.carry(operand, d, d)", ("check_rules stack", "tests/partitioner/test_infer.py", "tests/partitioner/test_chains.py")),
    Mutant("one tensor in two parts of an attention is cut", "partitioner/rules/attention.py", "op.alike = q not in (k, v)", "op.alike = True", (*ATTEND, "check_rules scaled_dot_product_attention")),
    Mutant("group heads are carried as heads", "partitioner/rules/attention.py", "if out_dim != heads or not grouped:", "if True:", (*ATTEND, "check_rules scaled_dot_product_attention"), "unequal lengths never unify: the heads become a blocked dim, which is whole, as without the change"),
    Mutant("an atom is cut in reverse", "partitioner/atoms.py", "parts = (self.fresh(at), self.fresh(minus(self._length[atom], at)))", "parts = (self.fresh(minus(self._length[atom], at)), self.fresh(at))", ATOMS),
    Mutant("an atom may be merged with its neighbour", "partitioner/atoms.py", "                if y in left or x in right:\n                    return False\n                self._forward", "                self._forward", (*ATOMS, "tests/fuzz/test_programs.py")),
    Mutant("equal by example is not recorded", "partitioner/lengths.py", "self.assume(sympy.Eq(a, b), about)", "pass", ("tests/partitioner/test_lengths.py",)),
)  # fmt: skip

EMIT_MUTANTS = (
    Mutant("every part is as long as the first", "partitioner/lengths.py", "return (length + ranks - 1 - rank) // ranks", "return -(-length // ranks)", LENGTHS),
    Mutant("symbolic parts grow with the rank", "partitioner/lengths.py", "FloorDiv(length + (ranks - 1 - rank), ranks)", "FloorDiv(length + rank, ranks)", LENGTHS),
    Mutant("a value is not gathered", "passes/emit.py", "self.hold(node, middle, self._gather(node, known[have], have, middle))", "self.hold(node, middle, known[have])", EMIT),
    Mutant("a part of the first rank is sliced everywhere", "passes/emit.py", '(y, d, segments), {"rank": self.view.rank}', '(y, d, segments), {"rank": 0}', EMIT),
    Mutant("a factor inside a product is cut outside of it", "passes/emit.py", "done = emit(opened, dim + 1, segments)", "done = emit(opened, dim, segments)", EMIT),
    Mutant("a rank's own part is not rounded where all hold it", "runtime/ulysses.py", "x if all(map(is_sharded, segments)) else form.rounded(x)", "x", ("tests/runtime/test_travel.py",)),
    Mutant("an exchange ends before work that it could hide", "passes/schedule.py", "                self.fill(node, upcoming)\n", "", ("tests/passes/test_schedule.py",)),
    Mutant("a partial sum is not completed", "passes/emit.py", 'reduced = self.call(all_reduce, (emitted, kind), {"group": "sp"})', "reduced = emitted", EMIT),
    Mutant(
        "a mean is divided by the local count", "passes/emit.py", "product(self.view.inference.table.axis_length(relation.operand_axes[i][d]) for i, d in dims)",
        "product(self.view.axis_length(relation.operand_axes[i][d], self.view.required(node, relation, i)[d]) for i, d in dims)", (*LOCALISE, *EMIT),
    ),
    Mutant("outputs that may differ in bits are not made equal", "passes/emit.py", "if node in self.values and origin(node) in self.diverging:", "if False:", ("tests/passes/test_emit.py",)),
    Mutant("a slice starts at its global position", "passes/localise.py", "start = emitter.view.axis_length(before, layout)", "start = emitter.view.axis_length(before, frozenset())", LOCALISE),
    Mutant("a slice has its global length", "passes/localise.py", "emitter.view.axis_length(kept, layout)", "emitter.view.axis_length(kept, frozenset())", LOCALISE),
    Mutant("a split has its global sizes", "passes/localise.py", "emitter.view.axis_length(axes[dim], layout)", "emitter.view.axis_length(axes[dim], frozenset())", LOCALISE),
    Mutant("leading padding is on every rank", "passes/localise.py", "table.expand(atoms[:1]), layouts[dim]", "table.expand(atoms[:1]), frozenset()", (*LOCALISE, "check_rules constant_pad_nd pad")),
    Mutant("padding before is put after", "passes/localise.py", "        if head:\n            pads[at] =", "        if head:\n            pads[at + 1] =", (*LOCALISE, "check_rules constant_pad_nd pad")),
    Mutant("a mean is not a sum", "passes/localise.py", "return aten.sum.dim_IntList, (bound", "return aten.mean.dim, (bound", LOCALISE),
    Mutant("a sharded convolution still pads", "passes/localise.py", "            padding[at] = 0\n", "", ("check_rules conv1d",)),
    Mutant("a window begins at its place among the results", "passes/localise.py", "needed.stride * position + needed.first", "position + needed.first", ("check_rules conv1d conv2d",)),
    Mutant("a window begins behind the padding", "partitioner/rules/conv.py", 'Window(stride, -before,', 'Window(stride, 0,', ("check_rules conv1d conv2d",)),
    Mutant("a window of a dim of two sequences is taken for one", "partitioner/candidates.py", "        return axis == ((atom,),)\n    if dim not in relation.halo", "        return True\n    if dim not in relation.halo", ("tests/test_mechanisms.py::test_a_shortened_sequence_that_is_cut_in_two_is_right",)),
    Mutant("a part of length one is squeezed away", "partitioner/rules/view.py", '    op.rewrite = Rewrite("view")', "    pass", (*LOCALISE, "check_rules squeeze")),
    Mutant("the mesh is read the other way round", "passes/attend.py", "self.ring_rank, self.ulysses_rank = divmod(emitter.view.rank, degrees.ulysses)", "self.ulysses_rank, self.ring_rank = divmod(emitter.view.rank, degrees.ring)", ATTEND),
    Mutant("a ring row is as long as one rank's part", "passes/attend.py", "[(j * self.ulysses, (j + 1) * self.ulysses) for j in range(self.ring)]", "[(j, j + 1) for j in range(self.ring)]", ATTEND),
    Mutant("every rank has the mask of the first heads", "passes/attend.py", "start, stop = heads.queries[self.ulysses_rank]", "start, stop = heads.queries[0]", ATTEND),
    Mutant("cut causal rows begin at zero", "passes/attend.py", "before = total(view.parts(atom)[: view.rank]) if atom in sharded else 0", "before = 0", ATTEND),
    Mutant("causal is forgotten under Ulysses", "passes/attend.py", "args = (q, k, v, mask, 0.0, spec.is_causal)", "args = (q, k, v, mask, 0.0, False)", ATTEND),
    Mutant("the scale is forgotten under a ring", "passes/attend.py", '{"scale": spec.scale, "enable_gqa": gqa}', '{"enable_gqa": gqa}', (*ATTEND, *RECOGNISE)),
    Mutant("the last key head of a group is missing", "partitioner/attention_heads.py", "first, last = start // group, -(-stop // group)", "first, last = start // group, max(stop // group, start // group + 1)", ("tests/partitioner/test_attention_heads.py",)),
    Mutant("divided groups read their key heads in plain order", "partitioner/attention_heads.py", "return first, last, None if regular else reads", "return first, last, None", ("tests/partitioner/test_attention_heads.py",)),
    Mutant("a written-out attention loses its scale", "passes/recognise.py", "scale=found.scale, ", "scale=None, ", RECOGNISE),
    Mutant("a mask is added before the scale", "passes/recognise.py", "node if mask.scale == 1.0 else", "node if True else", RECOGNISE),
    Mutant("a fill with a number that matters is added", "passes/recognise.py", 'if kind != "add" and number * scale > ABSORBS:', "if False:", RECOGNISE),
    Mutant("a masked fill shows what it should hide", "passes/recognise.py", 'return node if first.kind == "keep" else self.call(aten.logical_not.default, node)', "return node", RECOGNISE),
    Mutant("a switch goes to the parts it comes from", "passes/turn.py", "parts(source, have), index[target]", "parts(source, have), index[source]", ("tests/partitioner/test_phases.py",)),
    Mutant("statistics of a group norm count what is whole on every rank", "partitioner/candidates.py", "return (atom,) in axis", "return True", ("tests/test_mechanisms.py::test_statistics_count_what_every_rank_has_once",)),
    Mutant("parts too short for a halo are cut", "partitioner/candidates.py", "(inner if isinstance(inner, int) else 1)) * ranks", "(inner if isinstance(inner, int) else 1)) * 0", ("check_rules conv1d",)),
    Mutant("an atom in two places of a dim is cut", "partitioner/candidates.py", "return found - unclear", "return found", ("tests/partitioner/test_rules.py::test_one_sequence_in_two_places_of_an_operand_is_not_cut",)),
    Mutant("a part of a dim is reduced", "partitioner/label_problem.py", "return axis == first and alone and tuple(cut) in axis and all(", "return all(", ("tests/partitioner/test_chains.py::test_every_choice_of_sequences_is_right",)),
)  # fmt: skip

RUNTIME_MUTANTS = (
    Mutant("longer parts come last", "runtime/layout.py", "(length + size - 1 - rank) // size for rank", "(length + rank) // size for rank", LAYOUT),
    Mutant("a part starts one part too late", "runtime/layout.py", "start + sum(segment[:rank]), segment[rank]", "start + sum(segment[: rank + 1]), segment[rank]", LAYOUT),
    Mutant("the second sharded segment is read from the first", "runtime/layout.py", "offsets[r] = offsets[r] + n", "pass", LAYOUT),
    Mutant("gathered parts in reverse rank order", "runtime/layout.py", "for r, n in enumerate(sizes)]", "for r, n in reversed(list(enumerate(sizes)))]", LAYOUT),
    Mutant("the first rank's bits become the last rank's", "runtime/layout.py", ".narrow(0, 0, _numel(shape))", ".narrow(0, (size_of(group) - 1) * _numel(shape), _numel(shape))", ("tests/test_verify.py", "tests/runtime/test_layout.py"), "any one rank may give the value, as long as it is the same one everywhere"),
    Mutant("a peer gets the sender's own heads", "runtime/ulysses.py", "_heads(x, heads[i], peer)", "_heads(x, heads[i], rank)", ULYSSES),
    Mutant("what a peer sends has the own length", "runtime/ulysses.py", "part_length(segments[i], peer), heads", "part_length(segments[i], rank), heads", ULYSSES),
    Mutant("the own heads come first", "runtime/ulysses.py", "parts[r][0] for r in range(size)", "parts[r][0] for r in (rank, *(p for p in range(size) if p != rank))", ULYSSES),
    Mutant("blocks are taken for those of the next rank", "runtime/ring.py", "source, pending = (rank - step) % size, None", "source, pending = (rank + step) % size, None", RING),
    Mutant("the mask of a block is cut like its queries", "runtime/ring.py", "(3, key_ranges)):", "(3, self.query_ranges)):", RING),
    Mutant("the mask's rows are not cut", "runtime/ring.py", "for dim, ranges in ((2, self.query_ranges), (3, key_ranges)):", "for dim, ranges in ((3, key_ranges),):", RING),
    Mutant("blocks that overlap the diagonal are seen whole", "runtime/ring.py", "mask = None if last_key <= first_query else", "mask = None if first_key <= first_query else", RING),
    Mutant("a block after the queries is seen", "runtime/ring.py", "if first_key > last_query:\n            return None", "if False:\n            return None", RING, "the causal mask of such a block hides all of it: slower, and equal"),
    Mutant("keys held by all are attended by nobody", "runtime/ring.py", "if rank != size - 1:", "if rank >= 0:", RING),
    Mutant("rows that see nothing weigh blocks half and half", "runtime/ring.py", "count.to(lse.dtype).log(), lse)", "lse, lse)", RING),
    Mutant("every peer gets the own part of the new dim", "runtime/switch.py", "columns = global_ranges(to_segments, peer)", "columns = global_ranges(to_segments, rank)", ("tests/runtime/test_switch.py",)),
    Mutant("the own part comes first after a switch", "runtime/switch.py", "parts.insert(rank, kept)", "parts.insert(0, kept)", ("tests/runtime/test_switch.py",)),
    Mutant("a group is as large as its positions", "runtime/statistics.py", "count * wide.shape[2]", "count", ("tests/runtime/test_statistics.py",)),
    Mutant("blocks travel backwards", "runtime/groups.py", "in_sizes[(rank + 1) % size] = flat.shape[0]", "in_sizes[(rank - 1) % size] = flat.shape[0]", ("tests/runtime/test_simulate.py", *RING)),
    Mutant("the larger share gets the smaller weight", "runtime/attention.py", "torch.sigmoid(lse_b - lse_a)", "torch.sigmoid(lse_a - lse_b)", KERNEL),
    Mutant("the merged log-sum-exp is the larger one", "runtime/attention.py", "torch.logaddexp(lse_a, lse_b)", "torch.maximum(lse_a, lse_b)", KERNEL),
    Mutant("nothing merged with nothing is no number", "runtime/attention.py", ".masked_fill(lse_b == -math.inf, 0)", "", KERNEL),
    Mutant("partial results are merged in half precision", "runtime/attention.py", "return torch.lerp(out_a.to(wide), out_b.to(wide), share_b.unsqueeze(-1))", "return torch.lerp(out_a, out_b.to(out_a.dtype), share_b.unsqueeze(-1).to(out_a.dtype))", KERNEL),
    Mutant("a query does not see itself", "runtime/attention.py", ".unsqueeze(0) <= _positions(query_ranges", ".unsqueeze(0) < _positions(query_ranges", KERNEL),
    Mutant("rows that see nothing are left to the kernel", "runtime/attention.py", "return out.masked_fill(blind, 0), lse.masked_fill(blind.squeeze(-1), -math.inf)", "return out, lse", KERNEL),
    Mutant("selected heads are taken in a row", "runtime/attention.py", "return torch.cat([x.narrow(1, i, 1) for i in index], 1)", "return x.narrow(1, first, len(set(index)))", KERNEL),
    Mutant("a halo has the neighbour's width on the wrong side", "runtime/halo.py", "first, last = wire.narrow(dim, 0, after),", "first, last = wire.narrow(dim, 0, before),", HALO),
    Mutant("a halo is one position off", "runtime/halo.py", "wire.narrow(dim, wire.shape[dim] - before, before)", "wire.narrow(dim, max(wire.shape[dim] - before - 1, 0), before)", HALO),
    Mutant("beyond the ends are ones", "runtime/halo.py", "else x.new_zeros(shape)", "else x.new_ones(shape)", HALO),
    Mutant("halves of a complex number are swapped on the wire", "runtime/wire.py", "return torch.view_as_complex(x)", "return torch.view_as_complex(x.flip(-1).contiguous())", ("tests/runtime/test_wire.py",)),
)  # fmt: skip

GUARD_MUTANTS = (
    Mutant("values read from the inputs are not compared at a call", "module.py", "if specialisation.program.interface.guard is not None and not specialisation.choose(inputs):", "if False:", REPLAY),
    Mutant("a program for other values is taken for other lengths", "module.py", "if failed is None and program.fits(tensors):", "if failed is None:", ("tests/passes/test_replay.py::test_a_mask_that_hides_nothing_serves_other_lengths",)),
    Mutant("what partitioning assumed is not checked", "passes/guards.py", "(*shape_guards(traced.shape_env), *conditions)", "shape_guards(traced.shape_env)", SYMBOLIC),
    Mutant("fixed sizes are not checked", "passes/guards.py", "if sympy.sympify(size).xreplace(values) != actual:", "if False:", SYMBOLIC),
    Mutant("programs are never forgotten", "module.py", "> self._max_programs:", "> 10 * self._max_programs:", MODULE),
    Mutant("a forgotten program can still be called", "module.py", "self._fast.pop(fast_key, None)", "pass", ("tests/test_respecialise.py::test_forgotten_programs_leave_nothing_behind", *MODULE)),
    Mutant("buffers are not written back", "module.py", "    if interface.mutations:\n            write_back", "    if False:\n            write_back", ("tests/test_respecialise.py::test_the_mask_may_change_at_every_call", "tests/passes/test_trace.py::test_mutations_literals_and_shared_parameters")),
    Mutant("a program serves autocast and no autocast", "module.py", "self._model.training, autocast, None if", "self._model.training, None if", ("tests/test_module.py::test_a_program_made_under_autocast_is_not_used_outside_of_it",)),
)  # fmt: skip

PRICE_MUTANTS = (
    Mutant("riders are held by the first rank, wherever they lie", "partitioner/riders.py", "length if (first if run.index(atom) < at else last) else 0", "length if first else 0", RIDERS),
    Mutant("a host keeps its even part beside riders", "partitioner/riders.py", "total([*(lengths[:at] if first else ()), *(lengths[at + 1 :] if last else ())])", "0", RIDERS),
    Mutant("riders need not fit into a part", "partitioner/riders.py", "if sizes.hint(whole) < needed:", "if False:", RIDERS),
    Mutant("that riders fit is no condition on lengths", "partitioner/riders.py", "sizes.assume(sympy.Ge(whole, needed), (long[0],))", "pass", RIDERS),
    Mutant("some atoms of a stretch are a stretch", "partitioner/riders.py", "any(self.runs.get(atom) == factor for atom in factor)", "any(atom in self.runs for atom in factor)", RIDERS),
    Mutant("a rider rides without its host", "partitioner/riders.py", "return self.hosts.get(atom) in among", "return atom in self.hosts", RIDERS),
    Mutant("riders join attention that is not causal", "partitioner/riders.py", "if not spec.is_causal or spec.mask is not None:", "if spec.mask is not None:", RIDERS),
    Mutant("heads that ranks do not divide are never worth sharing", "partitioner/division.py", "if saved <= max(0.0, further) * prices.byte + prices.call:", "if True:", DIVISION),
    Mutant("what sharing moves costs nothing", "partitioner/division.py", "if saved <= max(0.0, further) * prices.byte + prices.call:", "if saved <= 0:", DIVISION),
    Mutant("a causal ring without zigzag order counts as even", "partitioner/division.py", "uneven *= 2 - 1 / degrees.ring", "pass", (*BALANCE, *DIVISION)),
    Mutant("shared causal heads have equal rows", "partitioner/division.py", "if spec.is_causal else share_heads(heads, degrees.ranks)", "if False else share_heads(heads, degrees.ranks)", DIVISION),
    Mutant("what a rank holds itself is priced as received", "partitioner/exchange_bytes.py", " - _common(p, edges[rank], edges[rank + 1])", "", BYTES),
    Mutant("a result that becomes whole is priced like parts", "partitioner/exchange_bytes.py", "(edges[0], edges[-1]) if whole else", "(edges[0], edges[-1]) if False else", BYTES),
    Mutant("the price is what the first rank receives", "partitioner/exchange_bytes.py", "return max(zip(*sums, strict=True), key=sum)", "return sums[0][0], sums[1][0]", BYTES),
    Mutant("repeated key heads are priced once", "partitioner/exchange_bytes.py", "stop - start if index is None else len(index)", "stop - start", BYTES),
    Mutant("riders are priced in even parts", "partitioner/exchange_bytes.py", "table.sizes.hint(self.riders.part(atom, table.length(atom), r, self.inference))", "(lengths[at] + ranks - 1 - r) // ranks", BYTES),
    Mutant("the exchanges of zigzag order are free", "partitioner/exchange_bytes.py", "(0, self.zigzag(cut)), ", "", BYTES),
    Mutant("around a ring in zigzag order travel contiguous parts", "partitioner/exchange_bytes.py", "lengths = dealt(self.row_parts)", "lengths = self.row_parts", BYTES),
    Mutant("every causal ring is dealt out", "partitioner/balance.py", "return saved > max", "return True or saved > max", BALANCE),
    Mutant("keys of another sequence are dealt out like the queries", "partitioner/balance.py", "if found.degrees.ring == 1 or not same_positions(inference, relation):", "if found.degrees.ring == 1:", BALANCE),
    Mutant("a late chunk does not see later blocks", "partitioner/zigzag.py", " + chunks[2 * size - 1 - r] * sum(lengths[r + 1 :])", "", ("tests/partitioner/test_zigzag.py",)),
    Mutant("pieces come back in the order of ranks", "runtime/head_shares.py", "for peer, i in order or [", "for peer, i in [", ("tests/runtime/test_zigzag.py::test_several_stretches",)),
    Mutant("rows beside whole keys begin at the first key", "passes/attend.py", '{"first": ranges[0][0], **common}', '{"first": 0, **common}', ("tests/partitioner/test_real_rates.py",)),
    Mutant("ranks with rows of a triangle are counted as one", "passes/plan_of.py", "return spec is not None and spec.is_causal", "return False", ("tests/partitioner/test_real_rates.py::test_rows_of_local_causal_attention_see_no_later_key",)),
    Mutant("every turn attends the first heads", "partitioner/turns.py", "group * first, first)", "0, 0)", TURNS),
    Mutant("turns are joined in reverse order", "passes/attend.py", "aten.cat.default, (parts, 2)", "aten.cat.default, (parts[::-1], 2)", TURNS),
    Mutant("turns are taken at rates that nobody named", "partitioner/turns.py", "if not prices.real or found.shared", "if found.shared", TURNS),
    Mutant("further collectives of turns are free", "partitioner/turns.py", "now) + self.back / turns + self.call", "now) + self.back / turns + self.call / turns", TURNS),
    Mutant("every rank adds the bias to its part of a sum", "passes/localise.py", "is None or emitter.view.rank == 0:", "is None or True:", ("tests/partitioner/test_token_mixing.py",)),
    Mutant("a sum over tokens has no bias", "passes/localise.py", "is None or emitter.view.rank == 0:", "is None:", ("tests/partitioner/test_token_mixing.py",)),
    Mutant("what a product is scaled by is left out with its addend", "partitioner/rules/matmul.py", 'data=(("beta", 0),)', 'data=(("beta", 0), ("alpha", 1))', ("tests/partitioner/test_token_mixing.py",)),
    Mutant("keys that are whole beside split ones are attended by every rank", "runtime/ring.py", "if rank != size - 1:  # the last", "if False:  # the last", RING),
    Mutant("results of split keys are merged in another order on every rank", "runtime/ring.py", "for r in range(1, size):\n        result = merge(*result, parts[2 * r]", "for r in sorted(range(1, size), key=lambda r: (r - rank) % size):\n        result = merge(*result, parts[2 * r]", (*RING, SPLIT)),
    Mutant("keys are split however many the queries are", "partitioner/split_keys.py", "longest >= ranks and CLEARLY * ranks", "longest >= ranks and 0 * ranks", (SPLIT,)),
    Mutant("merging the results of split keys is free", "partitioner/split_keys.py", "return (ranks - 1) * partial_bytes(inference, relation)", "return 0", (SPLIT,)),
    Mutant("the program of the lowest price is the fastest", "passes/fastest.py", "if (seconds := seconds_of(trial)) < least:", "if False:", ("tests/passes/test_fastest.py",)),
    Mutant("of programs of close prices the last is taken", "passes/fastest.py", "if (seconds := seconds_of(trial)) < least:", "if seconds := seconds_of(trial):", ("tests/passes/test_fastest.py",)),
    Mutant("a block of a ring is attended when the next has arrived", "passes/timeline.py", "            self.work(seconds / (journeys + 1))\n            self.wait(arrived)", "            self.wait(arrived)\n            self.work(seconds / (journeys + 1))", TIMELINE),
    Mutant("every transfer has a link of its own", "passes/timeline.py", "begin = max(self.free, self.now)", "begin = self.now", TIMELINE),
    Mutant("what is in flight is not waited for", "passes/timeline.py", "self.wait(self.flying.pop(node.args[0]))", "self.flying.pop(node.args[0])", TIMELINE),
    Mutant("an order is taken whatever memory it needs", "passes/schedule.py", "if program.peak(steps) <= limit:", "if True:", ("tests/passes/test_schedule.py::test_work_that_would_stay_alive_too_long_is_not_put_behind_an_exchange",)),
    Mutant("buffers on the wire need no memory", "passes/schedule.py", "self.wire[node] = 2 * received", "self.wire[node] = 0 * received", ("tests/passes/test_schedule.py::test_buffers_are_alive_while_they_are_on_their_way",)),
    Mutant("what filled the time of an exchange is done again", "passes/schedule.py", "if node in self.done:  # filled", "if False:  # filled", ("tests/passes/test_schedule.py::test_what_fills_one_exchange_is_not_done_again_after_another",)),
    Mutant("work that needs what is in flight fills its time", "passes/schedule.py", "candidate in self.program.transfer or any(n in blocked for n in candidate.all_input_nodes):", "candidate in self.program.transfer:", ("tests/passes/test_schedule.py::test_the_mlp_of_a_parallel_block_is_between_start_and_finish",)),
)  # fmt: skip

FORM_MUTANTS = (
    Mutant("fills of scores are applied in reverse order", "passes/recognise.py", "for mask in reversed(found.masks):", "for mask in found.masks:", RECOGNISE),
    Mutant("a fill that overflows stays finite", "passes/recognise.py", "overflows = abs(number) > torch.finfo(mask.dtype).max", "overflows = False", RECOGNISE),
    Mutant("a number left of where is kept where it is false", "passes/recognise.py", '("fill", args["other"], args["self"])', '("keep", args["other"], args["self"])', RECOGNISE),
    Mutant("rows of a grouped einsum are its heads", "passes/einsum.py", 'MatrixProduct(batch, free[-1], k, n, left, right, out, "".join(free[:-1]), swapped)', 'MatrixProduct(batch, free[0], k, n, left, right, out, "".join(free[1:]), swapped)', RECOGNISE),
    Mutant("any einsum may spread over heads", "passes/einsum.py", "if weights is not None or near_softmax", "if True or near_softmax", RECOGNISE),
    Mutant("a bias of heads is one of groups", "passes/grouped.py", "(batch, lead[1] * lead[2]) if (groups, heads) == lead[1:] else None", "(batch, 1)", RECOGNISE),
    Mutant("rows of flex attention are numbered from zero on every rank", "passes/flex_rows.py", "    known[row] = graph.call_function(aten.index.Tensor, (rows, [known[row]]))\n", "", ("tests/passes/test_flex.py",)),
    Mutant("states of all positions are no attention", "partitioner/written.py", "or list(_states(inference, products)) ", "", WRITTEN),
    Mutant("the channels of a state are its sequence", "partitioner/written.py", "summed = table.expand_axis(relation.operand_axes[0][-1])", "summed = table.expand_axis(relation.operand_axes[0][-2])", WRITTEN),
    Mutant("a loop that fills a mask cuts the sequence", "partitioner/infer.py", "if node.target in WRITES and op.fixed:", "if False:", ("tests/partitioner/test_infer.py::test_a_mask_filled_row_by_row_does_not_cut_the_sequence",)),
    Mutant("heads are exchanged with the scores of the layer before", "partitioner/solve.py", " or _takes_scores(attentions[n], inference)}", "}", ("tests/test_mechanisms.py::test_scores_of_the_layer_before_do_not_travel",)),
    Mutant("an einsum has no work", "partitioner/cost.py", "return einsum_flops(str(args[0]), shapes)", "return 0", ("tests/passes/test_count.py::test_flops_of_each_operator",)),
    Mutant("what a later operand sums is summed at once", "partitioner/equation.py", "made = both & set(out).union(*terms[i + 1 :])", "made = both & set(out)", ("tests/passes/test_count.py::test_flops_of_each_operator",)),
    Mutant("pixels are shuffled columns first", "passes/rearranged.py", "(0, 3, 1, 4, 2)", "(0, 3, 2, 4, 1)", ("tests/passes/test_rearranged.py",)),
    Mutant("padding before the tokens is zero, too", "passes/padded_encoder.py", "(hidden_BS & aligned)", "hidden_BS", PADDED),
    Mutant("padding is zero after the last norm", "passes/padded_encoder.py", "    return out_BSD if norm is None else norm(out_BSD)", "    return out_BSD if norm is None else norm(out_BSD).masked_fill((hidden_BS & aligned).unsqueeze(-1), 0.0)", PADDED),
    Mutant("a declared module is believed", "passes/opaque.py", "        if name in self.by_token:\n            check_tokens", "        if False:\n            check_tokens", BY_TOKEN),
    Mutant("experts run whole whatever is declared", "passes/opaque.py", "    if call.by_token:\n        made.meta", "    if False:\n        made.meta", BY_TOKEN),
    Mutant("experts on a rank's tokens count as on all", "runtime/opaque.py", " * math.prod(tensors[0].shape[:-1]) // math.prod(self.tokens) if self.by_token else self.flops", "", BY_TOKEN),
    Mutant("verify compares a model with one that has been called", "verification.py", "restored(model), buffers_kept(model):", "restored(model):", ("tests/test_verify.py::test_a_model_that_counts_its_calls_is_compared_from_one_state",)),
    Mutant("sealed pieces are as long as the sequence is up to their end", "runtime/sealed.py", "(x.shape[0], stop - start, last - first, x.shape[3])", "(x.shape[0], stop - start, last, x.shape[3])", SEALED),
    Mutant("exchanges of pieces are traced with symbols", "passes/seal.py", "    if name not in SEALABLE or one_stretch:", "    if True:", SEALED),
    Mutant("a view is read in the order of its dims", "passes/strided.py", "    return order + inner", "    return sorted(order + inner)", STRIDED),
    Mutant("a slice is read from the start of its storage", "passes/strided.py", "if isinstance(start, int) and start >= 0 else None", "if isinstance(start, int) else None", STRIDED),
    Mutant("reads behind a view are allowed", "passes/strided.py", "zip(window.shape, stride, strict=True)) < value.numel()", "zip(window.shape, stride, strict=True)) < 2 * value.numel()", STRIDED),
    Mutant("what wraps around is looked up", "passes/relative_shift.py", "and least >= 0 and most >= 0", "and least >= 0", SHIFT),
    Mutant("what lies before a row is looked up", "passes/relative_shift.py", "and least >= 0 and most >= 0", "and most >= 0", SHIFT),
    Mutant("a read is repeated whichever line asks", "passes/replay.py", "(self.records[i].function, self.records[i].where) == (self.function, where)", "self.records[i].function == self.function", ("tests/passes/test_replay.py::test_each_kind_of_read_is_exact_static_and_guarded",)),
    Mutant("neighbours of a sharded atom are those within it", "partitioner/candidates.py", "if axis[0] != (atom,) or", "if (atom,) not in axis or", ("tests/test_mechanisms.py::test_a_convolution_over_copies_is_right",)),
    Mutant("an enlarged dim is repeated as a whole", "partitioner/op.py", "(*self.axis(operand, dim), *(factor for n in repeats for factor in self.table.fresh_axis(n)))", "(*(factor for n in repeats for factor in self.table.fresh_axis(n)), *self.axis(operand, dim))", ("check_rules upsample_nearest1d upsample_nearest2d",)),
    Mutant("zeros in front of a convolution are on both sides", "passes/conv_padding.py", "before if before == after > 0 else 0", "before if before > 0 else 0", ("tests/test_mechanisms.py",)),
    Mutant("zeros around a part are taken for its rows", "passes/localise.py", "(x, dim, relation.halo[dim].before, emitter.local_shape(node)[dim])", "(x, dim, 0, emitter.local_shape(node)[dim])", ("tests/test_mechanisms.py",)),
    Mutant("the first contraction chooses its sequence", "partitioner/infer.py", "sorted(work, key=lambda n: -work[n])", "list(work)", ("tests/partitioner/test_beside.py",)),
    Mutant("an extra collective costs a share of a block however long that takes", "partitioner/cost.py", "call=min(machine.call_share * block, latency)", "call=machine.call_share * block", ("tests/test_decoders.py",)),
    Mutant("a sealed exchange may be swapped with its neighbour", "passes/seal.py", "    _keep_order(graph)\n", "", SEALED),
    Mutant("every part repeats its edges", "passes/localise.py", "            pads[2 * (rank - 1 - dim) : 2 * (rank - dim)] = [0, 0]\n", "", ("check_rules conv_edges",)),
    Mutant("a convolution with a stride reads one position less behind its part", "partitioner/rules/conv.py", "behind = max(after - (stride - 1), 0)", "behind = max(after - stride, 0)", ("check_rules conv1d",)),
    Mutant("a stride leaves all of an odd length", "partitioner/op.py", "length != shorter * stride or shorter == 1", "length // stride != shorter or shorter == 1", ("check_rules conv1d",)),
    Mutant("beyond the ends of a window are always zeros", "runtime/halo.py", "_end(x, dim, at, n, edges)", "_end(x, dim, at, n, False)", HALO),
    Mutant("uneven zeros are repeated edges", "passes/conv_padding.py", "both, zeros)", "both, False)", ("tests/test_mechanisms.py::test_equals_one_process",)),
    Mutant("a transposed convolution is cut where its own rows begin", "passes/localise.py", "around.before * stride[at] + padding[at]", "around.before * stride[at]", ("check_rules conv_transpose1d",)),
    Mutant("a transposed convolution needs no rows behind its part", "partitioner/rules/conv_transpose.py", "-(-padding // stride)", "padding // stride", ("check_rules conv_transpose1d",)),
    Mutant("an attribute that hides one of the class is not seen", "model_watch.py", "                or list(map(len, self._dictionaries)) != self._lengths\n", "", ("tests/test_model_watch.py",)),
    Mutant("a hook added to a compiled model is not seen", "model_watch.py", "any(self._empty)\n                or ", "", ("tests/test_model_watch.py",)),
    Mutant("what a compiled model's containers hold is not looked at", "model_watch.py", "                or self._containers != self._copies\n", "", ("tests/test_model_watch.py",)),
    Mutant("compiling sets the mode of all layers", "passes/trace.py", "flat.training = model.training", "flat.train(model.training)", ("tests/test_model_watch.py",)),
    Mutant("a model that keeps state is compiled", "passes/trace.py", "    if traced.assigns and warm and warm_failure is None:\n        check_no_state(model, call)\n", "", ("tests/passes/test_kept_state.py",)),
    Mutant("a symbolic number of heads is the example's", "passes/pipeline.py", "        relations += head_conditions(self.inference, self.solution)\n", "", ("tests/test_symbolic.py::test_a_number_of_heads_that_is_symbolic_is_a_condition",)),
    Mutant("rows with a scale for each block of them are divided", "partitioner/rules/quantised.py", "    if by_row or all(", "    if True or all(", ("tests/partitioner/test_quantised.py",)),
    Mutant("a weight may stay cast", "passes/weight_casts.py", "if (now.dtype, now.device) != (weight.dtype, weight.device):", "if False:", ("tests/test_weight_casts.py::test_a_layer_that_stays_cast_is_refused",)),
    Mutant("attributes of quantised weights are not looked at", "model_watch.py", "            self._contain(vars(names[name]), path)\n", "            pass\n", ("tests/test_quantised.py::test_lengths_that_change_and_weights_that_do",)),
    Mutant("another quantised weight is as good", "model_watch.py", "                or (bool(self._holders) and", "                or (False and", ("tests/test_quantised.py::test_another_weight_of_the_same_class",)),
    Mutant("all whole weights are made at once", "passes/schedule.py", "            if node in self.program.of_weights:\n                continue\n", "", ("tests/test_quantised.py::test_whole_weights_do_not_hinder_overlap",)),
    Mutant("a kernel may return another shape than its fake", "passes/composites.py", "    if made != expected:", "    if False:", ("tests/passes/test_composites.py::test_what_cannot_be_seen_stays_whole",)),
    Mutant("capped scores are plain attention", "passes/kernels.py", '"softcap": (0.0,)', '"softcap": (0.0, 30.0)', ("tests/passes/test_kernels.py",)),
    Mutant("packed sequences see those before them", "passes/packed.py", "build.call(aten.eq.Tensor, ", "build.call(aten.ge.Tensor, ", ("tests/passes/test_packed.py::test_ends_that_are_inputs",)),
    Mutant("packed sequences are never causal", "passes/packed.py", "    if causal:", "    if False:", ("tests/passes/test_packed.py::test_ends_that_are_inputs",)),
    Mutant("packed sequences fill the tensor", "passes/packed.py", " or q[-1] != queries", "", ("tests/passes/test_packed.py::test_rows_behind_the_last_end",)),
    Mutant("the sum of every half megabyte counts all words alike", "passes/checksum.py", " * multipliers).sum(1)", ").sum(1)", ("tests/passes/test_checksum.py",)),
)  # fmt: skip

REPEATED = ("tests/partitioner/test_repeats.py",)
REPEAT_MUTANTS = (
    Mutant("zeros of both signs are one number", "partitioner/repeats.py", "if isinstance(value, (float, complex, slice)):", "if isinstance(value, slice):", REPEATED),
    Mutant("anything may read what a copy makes", "partitioner/repeats.py", "if not self._within(node, index, blocks=2) or not all(", "if not all(", REPEATED),
    Mutant("a weight may be another block's", "partitioner/repeats.py", " and self._within(first, 1, blocks=1)", "", REPEATED),
    Mutant("copies may begin with other sequences", "partitioner/infer.py", " or (a != b and (a in sequences or b in sequences))", "", REPEATED),
    Mutant("a sequence of every block weighs as much as all of them", "partitioner/infer.py", "(weight if atom not in others else 0)", "weight", REPEATED),
    Mutant("one block is priced as one", "partitioner/label_problem.py", "self.current, self.problem.times = node, self.repeats.times.get(node, 1)", "self.current, self.problem.times = node, 1", REPEATED),
    Mutant("a block that stands for others is read by the first of them only", "partitioner/label_problem.py", "        for read in self.handed_on:\n            self._read(*read)\n", "", REPEATED),
    Mutant("blocks with other labels are copied", "passes/copied_blocks.py", "self._decided_alike(run, index) and ", "", REPEATED),
    Mutant("a copied node is noted for the block it was copied from", "passes/copied_blocks.py", "found.update({\"seqpar_source\": source.name}, ", "found.update({}, ", REPEATED),
)  # fmt: skip

MUTANTS = RULE_MUTANTS + EMIT_MUTANTS + RUNTIME_MUTANTS + GUARD_MUTANTS + PRICE_MUTANTS + FORM_MUTANTS + REPEAT_MUTANTS
