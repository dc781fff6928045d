"""Calibration of models prepared for quantization-aware training (torchao, pt2e)."""

import copy
import warnings

import pytest
import torch
from torch import fx, nn

import normkit

pytest.importorskip("torchao", reason="torchao is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao warns about parts that it lacks here.
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import (
        convert_pt2e,
        prepare_pt2e,
        prepare_qat_pt2e,
    )
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

pytestmark = pytest.mark.filterwarnings("ignore")

FIRST = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def data(batches: int = 6) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [0.3 + torch.randn(8, 3, 9, 9, generator=draw) for _ in range(batches)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU()),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.2, 4)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def prepared(*, qat: bool = True) -> fx.GraphModule:
    size = torch.export.Dim("n", min=2, max=64)
    model = net().train(qat)
    program = torch.export.export(model, (FIRST,), dynamic_shapes=({0: size},))
    quantizer = x86.X86InductorQuantizer()
    config = x86.get_default_x86_inductor_quantization_config(is_qat=qat)
    quantizer.set_global(config)
    prepare = prepare_qat_pt2e if qat else prepare_pt2e
    module = prepare(program.module(), quantizer)
    with torch.no_grad():
        module(FIRST)  # The observers see one batch.
    return module


def ranges(module: nn.Module) -> dict[str, torch.Tensor]:
    names = ("scale", "zero_point", "min_val", "max_val", "observer_enabled")
    return {
        name: tensor.clone()
        for name, tensor in module.named_buffers()
        if name.rpartition(".")[2] in names
    }


def weight_integers(module: fx.GraphModule) -> list[torch.Tensor]:
    """The integers of each quantized weight that a batch norm scales."""
    found = []

    def hook(quantizer: nn.Module, args: tuple[torch.Tensor], result: object) -> None:
        (x,) = args
        if quantizer.is_per_channel:
            scale = quantizer.scale.reshape(-1, *(1,) * (x.dim() - 1))
            found.append((x / scale).round().clamp(-128, 127))

    handles = [
        m.register_forward_hook(hook)
        for m in module.modules()
        if hasattr(m, "is_per_channel") and hasattr(m, "observer_enabled")
    ]
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        module(FIRST)
    module.load_state_dict(before)  # Its batch norms are in training.
    for handle in handles:
        handle.remove()
    return found


def test_the_statistics_are_those_of_the_quantized_layers() -> None:
    """Measured where the graph calls batch norm, with fake quantization on."""
    module = prepared()
    report = normkit.calibrate(module, data(), order="eval")
    assert [layer.name for layer in report.layers] == ["1", "4"]
    seen: list[torch.Tensor] = []
    call = next(
        node
        for node in module.graph.nodes
        if node.target is torch.ops.aten.batch_norm.default
    )

    class First(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n is call.args[0]:
                seen.append(result)
            return result

    for each in module.modules():
        if isinstance(getattr(each, "observer_enabled", None), torch.Tensor):
            each.observer_enabled.zero_()
    normkit.convert(module, to="frozen")
    call = next(n for n in module.graph.nodes if n.name == call.name)
    with torch.no_grad():
        for x in data():
            First(module).run(x)
    values = torch.cat(seen).transpose(0, 1).flatten(1)
    torch.testing.assert_close(report.layers[0].mean.float(), values.mean(1))
    torch.testing.assert_close(report.layers[0].var.float(), values.var(1))


def test_observers_hold_still_and_are_on_again_afterwards() -> None:
    module = prepared()
    before = ranges(module)
    wild = [100 * x for x in data()]
    normkit.calibrate(module, wild)
    after = ranges(module)
    weights = ("activation_post_process_1", "activation_post_process_3")
    for name, tensor in before.items():
        if not name.startswith(weights):
            assert torch.equal(after[name], tensor), name
    assert all(bool(t == 1) for n, t in after.items() if n.endswith("observer_enabled"))


def test_integer_weights_stay_and_ranges_follow_the_variances() -> None:
    module = prepared()
    for each in module.modules():
        if isinstance(getattr(each, "observer_enabled", None), torch.Tensor):
            each.observer_enabled.zero_()
    before = weight_integers(module)
    old = ranges(module)
    report = normkit.calibrate(module, data())
    after = weight_integers(module)
    assert len(before) == 2
    for one, other in zip(before, after, strict=True):
        # Values that lie on the border of two integers may round the other way.
        assert float((one != other).float().mean()) < 0.02
        assert float((one - other).abs().max()) <= 1
    scales = [n for n in old if n.endswith("scale")]
    moved = [n for n in scales if not torch.equal(old[n], ranges(module)[n])]
    assert len(moved) == 2
    report.undo(module)
    for name, tensor in old.items():
        torch.testing.assert_close(ranges(module)[name], tensor, rtol=1e-6, atol=0)


def test_a_calibrated_model_converts_to_what_it_simulated() -> None:
    module = prepared()
    normkit.calibrate(module, data(), order="eval")
    simulated = move_exported_model_to_eval(copy.deepcopy(module))
    for each in simulated.modules():
        if isinstance(getattr(each, "observer_enabled", None), torch.Tensor):
            each.observer_enabled.zero_()
    wanted = simulated(FIRST)
    converted = convert_pt2e(move_exported_model_to_eval(module))
    assert not [
        node for node in converted.graph.nodes if "batch_norm" in str(node.target)
    ]
    gap = (converted(FIRST) - wanted).abs()
    step = float(wanted.max()) / 127
    assert float(gap.max()) <= 3 * step
    assert float(gap.mean()) < 0.3 * step


def test_freezing_leaves_fake_quantization_on() -> None:
    module = prepared()
    assert len(normkit.convert(module, to="frozen").layers) == 2
    before = module.get_submodule("1").running_mean.clone()
    module(FIRST)
    assert torch.equal(module.get_submodule("1").running_mean, before)
    flags = [
        m.fake_quant_enabled
        for m in module.modules()
        if hasattr(m, "is_dynamic") and hasattr(m, "fake_quant_enabled")
    ]
    assert flags
    assert all(bool(flag[0] == 1) for flag in flags)
