"""The cases on which folding goes wrong elsewhere, one test each."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import normkit
from fold.randomised import check, randomise, randomised
from normkit.errors import FoldError


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


class Net(nn.Module):
    """Modules by name, and a forward given as a function of the net and its input."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def conv(inputs=4, outputs=4, kernel=1, **more):
    return nn.Conv2d(inputs, outputs, kernel, **more)


IMAGE = (2, 4, 5, 6)


def test_a_shared_conv_with_one_call_without_a_batch_norm_stays():
    net = Net(
        lambda net, x: (net.bn(net.conv(x)), F.gelu(net.conv(2 * x))),
        conv=conv(),
        bn=nn.BatchNorm2d(4),
    )
    check(randomised(net), normal(*IMAGE), left={"bn": "conv.weight is also used by"})


def test_a_shared_conv_with_two_batch_norms_stays():
    net = Net(
        lambda net, x: F.gelu(net.bn1(net.conv(x))) + F.gelu(net.bn2(net.conv(2 * x))),
        conv=conv(),
        bn1=nn.BatchNorm2d(4),
        bn2=nn.BatchNorm2d(4),
    )
    left = dict.fromkeys(["bn1", "bn2"], "conv.weight is also used by")
    check(randomised(net), normal(*IMAGE), left=left)


def test_a_conv_and_its_batch_norm_shared_together_fold():
    net = Net(
        lambda net, x: F.gelu(net.bn(net.conv(F.gelu(net.bn(net.conv(x)))))),
        conv=conv(),
        bn=nn.BatchNorm2d(4),
    )
    check(randomised(net), normal(*IMAGE))


def test_one_batch_norm_after_two_convs_folds_into_both():
    net = Net(
        lambda net, x: net.bn(net.conv2(F.gelu(net.bn(net.conv1(x))))),
        conv1=conv(),
        conv2=conv(),
        bn=nn.BatchNorm2d(4),
    )
    _, ledger = check(randomised(net), normal(*IMAGE))
    assert set(ledger.entries[0].where) == {
        "conv1.weight",
        "conv1.bias",
        "conv2.weight",
        "conv2.bias",
    }


def test_a_bias_that_would_be_created_for_one_call_alone_is_refused():
    net = Net(
        lambda net, x: F.gelu(net.conv(net.bn(x))) + F.gelu(net.conv(2 * x)),
        conv=conv(bias=False),
        bn=nn.BatchNorm2d(4, eps=0.0),
    )
    net = randomised(net)
    net.bn.weight.data.fill_(1.0)
    net.bn.running_var.fill_(1.0)
    check(net, normal(*IMAGE), left={"bn": "conv.bias is also used by 'conv'"})


def test_tied_weights_are_cloned_where_they_must_differ():
    one, two = conv(), conv()
    two.weight = one.weight
    net = nn.Sequential(one, nn.BatchNorm2d(4), nn.GELU(), two, nn.BatchNorm2d(4))
    folded, _ = check(randomised(net), normal(*IMAGE))
    assert folded[0].weight is not folded[3].weight


def test_a_weight_tied_to_a_layer_without_batch_norm_leaves_that_layer_alone():
    net = Net(
        lambda net, x: net.head(F.gelu(net.bn(net.body(x)))),
        body=nn.Linear(5, 5),
        bn=nn.BatchNorm1d(5),
        head=nn.Linear(5, 5, bias=False),
    )
    net.head.weight = net.body.weight
    net = randomised(net)
    folded, _ = check(net, normal(3, 5))
    assert torch.equal(folded.head.weight, net.head.weight)


def test_one_module_under_two_names_is_one_module():
    shared = nn.Sequential(conv(), nn.BatchNorm2d(4))
    net = Net(lambda net, x: net.b(F.gelu(net.a(x))), a=shared, b=shared)
    folded, _ = check(randomised(net), normal(*IMAGE), gone={"a.1"})
    assert folded.a is folded.b


def test_a_conv_whose_output_is_read_by_something_else_stays():
    net = Net(
        lambda net, x: F.gelu(net.bn(y := net.conv(x))) + F.gelu(y),
        conv=conv(),
        bn=nn.BatchNorm2d(4),
    )
    check(
        randomised(net),
        normal(*IMAGE),
        left={"bn": "gelu in the model's forward reads the output of 'conv'"},
    )


def test_a_conv_whose_output_is_also_returned_stays():
    net = Net(
        lambda net, x: {"raw": (y := net.conv(x)), "out": F.gelu(net.bn(y))},
        conv=conv(),
        bn=nn.BatchNorm2d(4),
    )
    check(
        randomised(net),
        normal(*IMAGE),
        left={"bn": "the output of 'conv' is returned by the model"},
    )


def test_a_second_reader_that_can_take_the_map_back_does():
    net = Net(
        lambda net, x: F.gelu(net.bn(y := net.conv(x))) + F.gelu(net.other(y)),
        conv=conv(),
        bn=nn.BatchNorm2d(4),
        other=conv(kernel=3),
    )
    net.run = lambda net, x: (
        F.gelu(net.bn(y := net.conv(x)))[..., 1:-1, 1:-1] + F.gelu(net.other(y))
    )
    _, ledger = check(randomised(net), normal(*IMAGE))
    assert "other.weight" in ledger.entries[0].where


def test_a_second_reader_that_pads_with_zeros_cannot():
    net = Net(
        lambda net, x: F.gelu(net.bn(y := net.conv(x))) + F.gelu(net.other(y)),
        conv=conv(),
        bn=nn.BatchNorm2d(4),
        other=conv(kernel=3, padding=1),
    )
    check(randomised(net), normal(*IMAGE), left={"bn": "'other' pads with zeros"})


def test_batch_norm_upon_batch_norm_composes():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
    check(randomised(net), normal(*IMAGE))


def test_batch_norm_upon_batch_norm_without_a_conv_leaves_one():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.GELU())
    net = randomised(net)
    _, ledger = normkit.fold(net, normal(*IMAGE))
    assert len(ledger.folded) == 1
    check(net, normal(*IMAGE), gone={entry.name for entry in ledger.folded})


def test_batch_norm_over_time_does_not_fold_into_a_linear_map_of_features():
    # T == F == 4: only the dimension tells, never the size.
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    check(
        randomised(net),
        normal(3, 4, 4),
        left={"1": "maps its output along dimension 2, the map changes along dim"},
    )


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, normkit.nn.BatchNorm2d])
def test_a_batch_norm_in_training_mode_stays_and_its_statistics_do_not_move(kind):
    net = randomised(nn.Sequential(conv(), kind(4)))
    net[1].train()
    before = copy.deepcopy(net.state_dict())
    _, ledger = normkit.fold(net, normal(*IMAGE))
    assert "training mode; call model.eval() first" in ledger.left[0].reason
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_batch_norm_without_running_statistics_stays():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False))
    check(randomised(net), normal(*IMAGE), left={"1": "statistics of each batch"})


def test_a_hook_on_the_conv_that_sees_its_output_keeps_the_batch_norm():
    net = randomised(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    seen = []
    handle = net[0].register_forward_hook(lambda *call: seen.append(call[-1]))
    _, ledger = normkit.fold(net, normal(*IMAGE))
    handle.remove()
    assert "is read by a hook of '0'" in ledger.left[0].reason


def test_a_hook_that_changes_an_output_is_part_of_the_function():
    net = randomised(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.GELU()))
    net[0].register_forward_hook(lambda module, args, y: F.gelu(y))
    check(net, normal(*IMAGE), left={"1": "is read by a hook of '0'"})


def test_a_hook_that_only_watches_stays_and_is_called():
    net = randomised(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.GELU()))
    shapes = []
    for layer in net[:2]:
        layer.register_forward_hook(lambda m, args, y: shapes.append(y.shape))
    net[1].register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape))
    folded, _ = check(net, normal(*IMAGE))
    shapes.clear()
    folded(normal(*IMAGE))
    assert len(shapes) == 3


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("kept", ["output", "alias", "number", "input"])
def test_a_hook_that_reads_keeps_what_it_reads(where, kept):
    net = randomised(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.GELU()))
    seen = []
    uses = {
        "output": lambda m, args, y: seen.append(y),
        "alias": lambda m, args, y: seen.append(y.detach()),
        "number": lambda m, args, y: seen.append(float(y.sum())),
        "input": lambda m, args, y: seen.append(args[0]),
    }
    net[where].register_forward_hook(uses[kept])
    x = normal(*IMAGE)
    folded, _ = normkit.fold(net, x)
    seen.clear()
    with torch.no_grad():
        net(x), folded(x)
    one, other = (torch.as_tensor(each) for each in seen)
    assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_no_hook_of_ours_stays_behind():
    net = randomised(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.GELU()))
    folded, _ = normkit.fold(net, normal(*IMAGE))
    for model in (net, folded):
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "pruned"],
)
def test_a_weight_that_is_computed_from_others_is_left_alone(wrap):
    net = nn.Sequential(wrap(conv()), nn.BatchNorm2d(4))
    check(randomised(net), normal(*IMAGE), left={"1": "computed in its forward"})


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "pruned", "old", "older"],
)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@torch.no_grad()
def test_a_weight_that_is_computed_can_be_stored(wrap, inplace):
    net = randomised(nn.Sequential(wrap(conv()), nn.BatchNorm2d(4)))
    x = normal(*IMAGE)
    expected, other = net(x), copy.deepcopy(net)
    _, ledger = normkit.fold(net, x)
    assert ledger.notice.startswith("1 module computes a weight")
    assert "materialize=True (--materialize)" in ledger.to_text().splitlines()[0]
    folded, ledger = normkit.fold(net, x, materialize=True, inplace=inplace)
    assert len(ledger.folded) == 1, ledger
    assert not ledger.notice
    assert torch.allclose(folded(x), expected, rtol=1e-12, atol=1e-12)
    assert type(folded[0]) is nn.Conv2d
    assert isinstance(folded[0].weight, nn.Parameter)
    assert not folded[0]._forward_pre_hooks
    assert (folded is net) == inplace
    # Other copies of the model, and the original, still compute theirs.
    assert torch.equal(other(x), expected)
    if not inplace:
        assert torch.equal(net(x), expected)


def test_a_weight_is_not_stored_in_training_mode():
    net = randomised(nn.Sequential(parametrizations.spectral_norm(conv())))
    net.append(nn.BatchNorm2d(4).eval())
    net[0].train()
    with pytest.raises(FoldError, match=r"call model\.eval"):
        normkit.fold(net.double(), normal(*IMAGE), materialize=True)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_an_old_weight_norm_neither_crashes_the_copy_nor_is_folded_wrong():
    net = nn.Sequential(nn.utils.weight_norm(conv()), nn.BatchNorm2d(4))
    net = randomised(net)
    net(normal(*IMAGE))
    check(net, normal(*IMAGE), left={"1": "computed in its forward"})


def test_a_weight_standardized_conv_is_left_alone_and_not_counted():
    class StandardizedConv(nn.Conv2d):
        def forward(self, x):
            flat = self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(flat, None, None, training=True, eps=1e-6)
            return F.conv2d(x, weight.reshape_as(self.weight), self.bias)

    net = nn.Sequential(StandardizedConv(4, 6, 3), nn.BatchNorm2d(6))
    _, ledger = check(
        randomised(net), normal(*IMAGE), left={"1": "computed in its forward"}
    )
    assert len(ledger.entries) == 1


def test_zero_padding_between_conv_and_batch_norm_keeps_it():
    net = Net(
        lambda net, x: net.bn(F.pad(net.conv(x), (1, 1, 1, 1))),
        conv=conv(),
        bn=nn.BatchNorm2d(4),
    )
    check(randomised(net), normal(*IMAGE), left={"bn": "pads with zeros"})


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_with_copies_is_no_obstacle(mode):
    net = Net(
        lambda net, x: net.bn(F.pad(net.conv(x), (1, 1, 2, 1), mode=mode)),
        conv=conv(),
        bn=nn.BatchNorm2d(4),
    )
    check(randomised(net), normal(*IMAGE))


def test_average_pooling_that_counts_its_padding_keeps_it():
    net = nn.Sequential(conv(), nn.AvgPool2d(3, padding=1), nn.BatchNorm2d(4))
    check(randomised(net), normal(*IMAGE), left={"2": "averages over zero padding"})


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, padding=1, count_include_pad=False),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(scale_factor=2),
        nn.PixelShuffle(2),
        nn.PixelUnshuffle(1),
        nn.ChannelShuffle(2),
        nn.Dropout(0.5),
        nn.ZeroPad2d(0),
    ],
    ids=repr,
)
def test_what_commutes_with_the_map_lets_it_through(pool):
    channels = 1 if isinstance(pool, nn.PixelShuffle) else 4
    net = nn.Sequential(conv(), pool, nn.BatchNorm2d(channels))
    check(randomised(net), normal(*IMAGE))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(2)], ids=repr)
def test_max_pooling_lets_positive_scales_through_and_no_other(pool):
    net = nn.Sequential(conv(), pool, nn.BatchNorm2d(4))
    check(randomised(net, signs=False), normal(*IMAGE))
    check(randomised(net), normal(*IMAGE), left={"2": "no negative scale"})


def test_a_float16_weight_that_would_overflow_is_refused():
    net = randomised(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    net[1].weight.data[:] = 1e6
    net[0].half()
    run = Net(
        lambda net, x: net.body[1](
            net.body[0](x.to(net.body[0].weight.dtype)).double()
        ),
        body=net,
    )
    _, ledger = normkit.fold(run, normal(*IMAGE))
    assert "would overflow its dtype" in ledger.left[0].reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_conv_with_a_float32_batch_norm_folds(dtype):
    net = Net(
        lambda net, x: net.bn(net.conv(x.to(net.conv.weight.dtype)).float()),
        conv=conv(bias=False),
        bn=nn.BatchNorm2d(4),
    )
    randomised(net).float()
    net.conv.to(dtype)
    folded, ledger = normkit.fold(net, torch.randn(IMAGE))
    assert len(ledger.folded) == 1
    assert folded.conv.weight.dtype == dtype
    x = torch.randn(IMAGE)
    expected, found = net(x), folded(x)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_tiny_variance_folds():
    net = randomised(nn.Sequential(conv(), nn.BatchNorm2d(4, eps=1e-12)))
    net[1].running_var[0] = 1e-12
    net[1].running_mean[0] = 0.0
    check(net, normal(*IMAGE))


def test_a_weight_of_zero_folds_before_and_after():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.GELU(), nn.BatchNorm2d(4), conv())
    net = randomised(net)
    for index in (1, 3):
        net[index].weight.data[1] = 0.0
    check(net, normal(*IMAGE))


def test_a_variance_of_zero_without_eps_is_refused_by_name():
    net = randomised(nn.Sequential(conv(), nn.BatchNorm2d(4, eps=0.0)))
    net[1].running_var[0] = 0.0
    _, ledger = normkit.fold(net, normal(*IMAGE))
    assert ledger.left[0].reason.endswith("its own scale or shift is not finite")


def test_complex_views_are_left_alone():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            y = torch.view_as_complex(self.conv(x).reshape(2, 4, 5, 3, 2))
            return self.bn(torch.view_as_real(y * y).reshape(2, 4, 5, 6))

    check(randomised(Complex()), normal(*IMAGE), left={"bn": "view_as_real"})


def test_a_write_in_place_after_an_alias_does_not_reach_the_alias():
    def forward(net, x):
        y = net.conv(x)
        z = net.bn(y)
        z.relu_()
        return net.other(y) + z

    net = Net(forward, conv=conv(), bn=nn.BatchNorm2d(4), other=conv())
    check(randomised(net), normal(*IMAGE))


def test_a_write_in_place_does_not_reach_the_input_of_the_model():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Identity(), conv())
    net = Net(
        lambda net, x: net.conv(net.bn(x).mul_(2.0)), bn=nn.BatchNorm2d(4), conv=conv()
    )
    net = randomised(net)
    x = normal(*IMAGE)
    folded, _ = check(net, x)
    before = x.clone()
    folded(x)
    assert torch.equal(x, before)


def test_a_write_in_place_to_the_input_of_the_batch_norm_is_seen():
    def forward(net, x):
        y = net.conv(x)
        z = net.bn(y)
        y.relu_()
        return F.gelu(z) + F.gelu(y)

    net = Net(forward, conv=conv(), bn=nn.BatchNorm2d(4))
    check(randomised(net), normal(*IMAGE), left={"bn": "relu"})


def test_a_write_through_a_view_is_seen():
    def forward(net, x):
        y = net.conv(x)
        view = y.view(2, 4, -1)
        view.mul_(3.0)
        return net.bn(y)

    net = Net(forward, conv=conv(), bn=nn.BatchNorm2d(4))
    check(randomised(net), normal(*IMAGE), left={"bn": "in-place write"})


def test_folding_again_changes_nothing():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.GELU(), nn.BatchNorm2d(4))
    once, _ = check(randomised(net), normal(*IMAGE), gone={"1"})
    twice, ledger = check(once, normal(*IMAGE), gone=set())
    assert len(ledger.entries) == 1
    for one, other in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_batch_norm_whose_weight_is_read_elsewhere_stays():
    net = Net(
        lambda net, x: net.bn(net.conv(x)) * net.bn.weight.sum(),
        conv=conv(),
        bn=nn.BatchNorm2d(4),
    )
    check(randomised(net), normal(*IMAGE), left={"bn": "bn.weight is also used by"})


def test_a_batch_norm_whose_attributes_are_read_elsewhere_stays():
    net = Net(
        lambda net, x: net.bn(net.conv(x)) / net.bn.num_features,
        conv=conv(),
        bn=nn.BatchNorm2d(4),
    )
    check(randomised(net), normal(*IMAGE), left={"bn": "no attribute 'num_features'"})


def test_dropout_that_is_active_at_inference_keeps_it():
    net = randomised(nn.Sequential(conv(), nn.Dropout(0.5), nn.BatchNorm2d(4)))
    net[1].train()
    state = torch.get_rng_state()
    _, ledger = normkit.fold(net, normal(*IMAGE))
    assert "dropout" in ledger.left[0].reason
    torch.set_rng_state(state)
    normal(*IMAGE)
    assert torch.equal(torch.get_rng_state(), torch.get_rng_state())


def test_a_batch_norm_that_did_not_run_says_so():
    net = Net(
        lambda net, x: net.bn(net.conv(x)),
        conv=conv(),
        bn=nn.BatchNorm2d(4),
        auxiliary=nn.BatchNorm2d(4),
    )
    check(
        randomised(net),
        normal(*IMAGE),
        left={"auxiliary": "did not run on the example inputs"},
    )


def test_a_batch_norm_that_is_the_whole_model_stays():
    norm = nn.BatchNorm2d(4).double()
    randomise(norm)
    check(norm.eval(), normal(*IMAGE), left={"": "the model itself"})


def test_a_conv_outside_the_module_tree_is_left_alone():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = [conv()]
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.hidden[0](x))

    net = randomised(Hidden())
    net.hidden[0].double()
    check(net, normal(*IMAGE), left={"bn": ""})


def test_a_model_that_cannot_be_copied_is_refused_whole():
    net = randomised(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    net.stream = (number for number in range(3))
    with pytest.raises(FoldError, match="cannot be deep-copied"):
        normkit.fold(net, normal(*IMAGE))
    assert isinstance(net[1], nn.BatchNorm2d)


def test_inputs_that_the_model_refuses_are_the_callers_error():
    net = randomised(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    with pytest.raises(FoldError, match="failed on example_inputs"):
        normkit.fold(net, normal(2, 3, 5, 6))


def test_what_is_no_module_is_refused():
    with pytest.raises(FoldError, match=r"needs a torch\.nn\.Module, got str"):
        normkit.fold("model.onnx", normal(1))


def test_code_that_looks_at_values_is_believed_only_outside_of_it():
    class Steered(nn.Module):
        def __init__(self):
            super().__init__()
            self.safe = nn.Sequential(conv(), nn.BatchNorm2d(4))
            self.conv = conv()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(self.safe(x))
            return self.bn(y) if x.sum() > -1e9 else y

    check(randomised(Steered()), normal(*IMAGE), left={"bn": "looks at values"})


def test_a_bias_that_a_module_lacks_altogether_is_not_invented():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.bn(F.linear(x, self.weight))

    check(randomised(Plain()), normal(3, 4), left={"bn": "has no bias to change"})
