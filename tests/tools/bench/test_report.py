"""Tables and JSON of a run."""

import dataclasses
import json

from seqpar.tools.bench.report import COLUMNS, Run, from_dict, markdown, table, to_dict
from seqpar.tools.bench.timed import Timed
from seqpar.tools.sized_models import Sizes

KINDS = {"all_to_all": 4, "ring": 0, "all_gather": 1, "all_reduce": 0}
RUN = Run(
    "flux",
    Sizes(),
    (
        Timed("one process", 1, 1, (10.0, 20.0, 30.0), peak_bytes=(1,)),
        Timed("seqpar", 2, 1, (5.0, 12.0, 15.0), {kind: 2**20 * n for kind, n in KINDS.items()}, KINDS, 1e-7, (2**20, 2**21), 1.5),
        Timed("diffusers", 1, 2, refusal="RuntimeError: uneven"),
    ),
    backend="inductor",
)


def test_the_table_has_every_program():
    text = table(RUN)
    assert "cannot: RuntimeError: uneven" in text and "2.000 [1.833 .. 2.000]" in text  # 10/5, 20/12, 30/15
    assert "4 all_to_all, 1 all_gather" in text and "flux: 4 blocks, 8 x 64, 1,024 + 64 tokens, float32, inductor; 3 rounds" in text
    widths = {len(line) for line in text.splitlines()[1:4]}
    assert len(widths) == 1  # columns stand under their names


def test_a_section_of_a_page_is_a_table():
    lines = markdown(RUN).splitlines()
    assert [line.count("|") for line in lines if line.startswith("|")] == [len(COLUMNS) + 1] * 5


def test_json_reads_back():
    data = json.loads(json.dumps(to_dict(RUN)))
    assert from_dict(data) == RUN
    assert data["programs"][1]["speed_up"]["median"] == 2.0 and "speed_up" not in data["programs"][2]
    assert dataclasses.replace(RUN, link="on a slow link").title.endswith("inductor, on a slow link")
