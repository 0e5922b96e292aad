"""Lane parallelism: lanes divided among processes, on 2 and 4 of them; and, in one process, which ops can be divided and how."""


import distributed_worker as worker
import lanes_worker
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_distributed import torchrun
from torch import nn

import fxfuse
from fxfuse.fused import regions
from fxfuse.lane_parallel.dividing import divided
from fxfuse.passes.split import Split, Step, Trial, alike

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_as_one(processes, tmp_path):
    torchrun(processes, "train", tmp_path, "lanes_worker.py")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # so it is, in this process
@pytest.mark.parametrize("processes", [2, 4])
def test_state(processes, tmp_path):
    torchrun(processes, "state", tmp_path, "lanes_worker.py")
    for kind, lanes in (("images", 2 * processes), ("images", 2 * processes + 1), ("cat", 2 * processes)):  # read by one process, whole
        inputs, y = lanes_worker.batch(lanes, kind)
        expected = lanes_worker.trained(lanes_worker.build(kind, lanes), "sgd", inputs, y).state_dict()
        model = lanes_worker.fused(kind, lanes)
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path / f"{kind}{lanes}", no_dist=True)
        model.load_state_dict(state["model"])
        worker.assert_same(dict(fxfuse.original_state_dict(model)), dict(expected), kind)


PHASES = {
    "failing": "what fails on one process changes nothing on any", "adopting": "the plan of the first process",
    "afterwards": "what users do afterwards", "uneven": "lanes without equal shares",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: PHASES[phase].replace(" ", "_"))
def test_on_several_processes(phase, processes, tmp_path):
    torchrun(processes, phase, tmp_path, "lanes_worker.py")


@pytest.mark.slow
def test_a_process_without_lanes(tmp_path):
    torchrun(4, "idle", tmp_path, "lanes_worker.py")


@pytest.mark.slow
def test_with_data_parallelism(tmp_path):
    torchrun(4, "grid", tmp_path, "lanes_worker.py")


@pytest.mark.slow
def test_dropout(tmp_path):
    torchrun(2, "dropout", tmp_path, "lanes_worker.py")


# -- in one process ----------------------------------------------------------------------------------------------------


def tried(build, packs, **values):
    """The trial of a graph with placeholders and get_attr nodes by name; its last node is the subject."""
    graph = torch.fx.Graph()
    nodes = {name: graph.get_attr(name) if name in packs else graph.placeholder(name) for name in values}
    graph.output([build(graph, **nodes)])

    def call(node, args, kwargs):
        return getattr(args[0], node.target)(*args[1:], **kwargs) if node.op == "call_method" else node.target(*args, **kwargs)

    trial = Trial(graph, 2, {name: Split(0, starts) for name, starts in packs.items()}, call)
    trial.values.update({nodes[name]: value for name, value in values.items()})
    trial.run()
    last = list(graph.nodes)[-2]
    return trial.steps[last], nodes


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
class TestSplit:
    def test_a_batched_product_of_a_common_input(self):
        step, nodes = tried(lambda g, x, w: g.call_function(torch.bmm, (x, w)), {"w": (0, 3, 5)}, x=randn(5, 4, 2), w=randn(5, 2, 6))
        assert step.own
        assert step.result == Split(0, (0, 3, 5))
        assert dict(step.cuts) == {nodes["x"]: Split(0, (0, 3, 5))}

    def test_a_grouped_convolution_has_fewer_groups(self):
        def build(g, x, w):
            return g.call_function(torch.conv1d, (x, w, None, (1,), (0,), (1,), 6))

        step, _ = tried(build, {"w": (0, 6, 12)}, x=randn(4, 6, 5), w=randn(12, 1, 3))
        assert step.result == Split(1, (0, 6, 12))
        assert step.sizes == ((("args", 6), (3, 3)),)

    def test_of_a_sum_over_lanes_the_sum_moves(self):
        step, _ = tried(lambda g, w: g.call_function(torch.sum, (w, 0)), {"w": (0, 3, 5)}, w=randn(5, 4))
        assert step.total

    @pytest.mark.parametrize("function", [torch.cumsum, torch.softmax, torch.flip])
    def test_what_mixes_lanes_needs_all(self, function):
        dims = [0] if function is torch.flip else 0
        step, _ = tried(lambda g, w: g.call_function(function, (w, dims)), {"w": (0, 3, 6)}, w=randn(6, 6))
        assert not step.own

    def test_a_bias_is_not_added_once_per_process(self):
        def build(g, b, x, w):
            return g.call_function(torch.addmm, (b, x, w))

        step, _ = tried(build, {"w": (0, 3, 6)}, b=randn(2), x=randn(4, 6), w=randn(6, 2))
        assert not step.own

    def test_rows_of_a_table_count_from_the_processs_own(self):
        ids = torch.randint(0, 7, (4, 3)) + torch.tensor([0, 7, 14])
        ids = torch.cat([ids, ids[:, :1] + 21], 1)
        step, nodes = tried(lambda g, i, w: g.call_function(nn.functional.embedding, (i, w)), {"w": (0, 14, 28)}, i=ids, w=randn(28, 3))
        assert step.result == Split(1, (0, 2, 4))
        assert dict(step.shifts) == {nodes["i"]: (0, 14)}

    def test_nothing_is_concluded_from_nan_and_constants(self):
        step, _ = tried(lambda g, w: g.call_function(torch.log, (w,)), {"w": (0, 3, 6)}, w=-randn(6, 2).abs())
        assert not step.own
        zeros = torch.zeros(6, 2, dtype=torch.float64)
        step, _ = tried(lambda g, x, w: g.call_function(torch.mul, (x, w)), {"w": (0, 3, 6)}, x=randn(6, 2), w=zeros)
        assert not step.own

    def test_dropout_of_lanes_and_of_what_is_in_a_list_of_its_own(self):
        step, _ = tried(lambda g, w: g.call_function(nn.functional.dropout, (w, 0.5)), {"w": (0, 3, 6)}, w=randn(6, 50))
        assert step.draws
        assert step.result == Split(0, (0, 3, 6))
        step, _ = tried(lambda g, w: g.call_function(nn.functional.dropout1d, (w, 0.5)), {"w": (0, 3, 6)}, w=randn(6, 50))
        assert not step.own


def test_parts_that_grow_with_the_batch():
    small, large = Split(0, (0, 6, 10)), Split(0, (0, 9, 15))  # 5 lanes of 2 rows, of 3
    assert alike(Step(True, result=small), Step(True, result=large))
    for other in (Split(1, (0, 9, 15)), Split(0, (0, 8, 15)), None):
        assert not alike(Step(True, result=small), Step(True, result=other))
    assert not alike(Step(True, result=Split(0, (0, 4, 4))), Step(True, result=Split(0, (0, 6, 6))))
    assert not alike(Step(True, result=small), Step(False))


def plan_for(kind, lanes, world):
    (state,) = regions(lanes_worker.fused(kind, lanes)).values()
    return divided(state, world, 0, "processes")


def test_what_stays_whole_says_why():
    _, sharding = plan_for("cat", 5, 2)
    assert sharding.sharded
    assert set(sharding.whole) == {f"packed.nets.{i}.bias" for i in (0, 2, 4)}
    assert any("stays whole on every process: its 5 lanes of 8 rows have no edges where 2 equal parts of 40 rows do" in line
               for line in sharding.sentences())  # fmt: skip


def test_more_processes_than_lanes():
    _, sharding = plan_for("cat", 3, 4)
    assert sharding.sharded
    assert sharding.idle
    (state,) = regions(lanes_worker.fused("cat", 3)).values()
    plan, sharding = divided(state, 4, 0, "processes", idle=False)
    assert plan is state.plan
    assert "3 lanes are too few for 4 processes: one of them would have none" in sharding.whole.values()


def test_the_report_states_the_bytes():
    _, sharding = plan_for("sum", 4, 2)
    assert "forward sums rows x 2 over processes: 16 bytes per row" in sharding.sentences()
    _, sharding = plan_for("cat", 4, 2)
    assert "forward gathers rows x 8 over processes: 64 bytes per row" in sharding.sentences()


def test_lanes_cut_into_parts_stay_whole():
    model = lanes_worker.fused("cat", 4)
    fxfuse.freeze(model, "nets.1.*")
    (state,) = regions(model).values()
    plan, sharding = divided(state, 2, 0, "processes")
    assert plan is state.plan
    assert not sharding.sharded
    assert all("cut into parts" in reason for reason in sharding.whole.values())
