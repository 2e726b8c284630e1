"""What an emulation found, in words."""

import dataclasses
import json

from seqpar.partitioner.machines import MACHINES
from seqpar.tools.bench.emulated import COLUMNS, Emulated, RankTimes, cells, markdown, table

ROWS = [
    RankTimes((30.0, 60.0), (3.0, 5.0), 2**20, 2, 1, 0, 1, 2**21, 5, 10.0),
    RankTimes((20.0, 40.0), (3.0, 5.0), 2**20, 2, 1, 1, 1, 2**21, 5, 10.0),
    RankTimes((10.0, 20.0), (3.0, 5.0), 2**20, 2, 2, 0, 4, 2**21, 9, 15.0),
]
FOUND = dataclasses.replace(Emulated.of(RankTimes((50.0, 100.0), (4.0, 4.0), 2**22), ROWS, MACHINES["H100"], 2.0), title="full:flux at 1024x1024, bfloat16")


def test_the_slowest_rank_of_each_mesh_is_shown():
    assert [row[0] for row in cells(FOUND)] == ["-", "u2", "u2r2"]
    two = dict(zip(COLUMNS, cells(FOUND)[1], strict=True))
    assert two["computing ms"] == "45.0" and two["x ranks / one"].startswith("1.200 [") and two["step ms"] == "55.0" and two["speed-up"] == "1.36"


def test_tables_say_what_is_predicted():
    for text in (table(FOUND), markdown(FOUND)):
        assert "full:flux at 1024x1024, bfloat16" in text and "Predicted: collectives (of H100, NVLink: 150 GB/s" in text and "measured: computing" in text


def test_json_reads_back():
    assert Emulated.from_dict(json.loads(json.dumps(FOUND.to_dict()))) == FOUND
