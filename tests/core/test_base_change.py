"""Products added to the base model: against dense sums, undone exactly, refused where lost."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.adapters import AdapterState, at_rank, combined
from fedpeft.config import AdapterSettings
from fedpeft.errors import AdapterError, ModelError
from fedpeft.models import AdaptedModel, Workbench, adapter_schema, load_base

LORA = AdapterSettings(rank=3, alpha=4.0)
SCALE = 4.0 / 3
PREFIX = "base_model.model."
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")


@pytest.fixture
def gpt2_model(tiny_model: Path, tmp_path: Path) -> Path:
    """Directory of a random GPT-2, whose layers are Conv1D."""
    import shutil

    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(5)
        network: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=320,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=1,
            )
        )
    network.save_pretrained(tmp_path / "gpt2")
    for file in tiny_model.glob("*token*"):
        shutil.copy(file, tmp_path / "gpt2")
    return tmp_path / "gpt2"


def products(
    directory: Path, ranks: list[int], settings: AdapterSettings = LORA, size: float = 0.1
):
    """Return products of these ranks with their digests (here any names)."""
    schema, found = adapter_schema(directory, settings), list[tuple[str, AdapterState]]()
    for number, rank in enumerate(ranks):
        own = schema.of_rank(rank)
        values = torch.randn(own.numel, generator=torch.Generator().manual_seed(number)) * size
        found.append((f"digest {number}", AdapterState(own, values)))
    return found


def adapted(bench: Workbench, directory: Path, change: Any = (), **options: Any) -> AdaptedModel:
    values: dict[str, Any] = {"settings": LORA, "quantization": "none", "dtype": "float32"}
    settings = (values := values | options).pop("settings")
    return bench.adapted(directory, settings, base_change=change, **values)


def weights(model: AdaptedModel) -> dict[str, torch.Tensor]:
    """Return all values of the base model, by their names in it without an adapter."""
    tensors = model.base.network.state_dict()
    return {
        name.replace(".base_layer", ""): tensor.clone()
        for name, tensor in tensors.items()
        if ".lora_" not in name
    }


def dense(state: AdapterState) -> dict[str, torch.Tensor]:
    """Return every module's product BA, (outputs, inputs), in float64."""
    tensors = {name: tensor.double() for name, tensor in state.tensors().items()}
    modules = {spec.module for spec in state.schema.tensors}
    return {
        module.removeprefix(PREFIX): tensors[f"{module}.lora_B.weight"]
        @ tensors[f"{module}.lora_A.weight"]
        for module in modules
    }


@torch.no_grad()
def logits(model: AdaptedModel) -> torch.Tensor:
    model.eval_mode()
    return model.base.network(input_ids=torch.tensor([[5, 9, 200, 31, 7, 64]])).logits


def bare(directory: Path) -> dict[str, torch.Tensor]:
    base = load_base(directory, quantization="none", dtype=torch.float32, device=CPU)
    return base.network.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What is refused


def test_a_quantised_base_is_refused_with_what_to_do(tiny_model: Path):
    with pytest.raises(ModelError, match=r'nf4.* use strategy "alternating"'):
        adapted(Workbench(), tiny_model, products(tiny_model, [2]), quantization="nf4")


def test_a_product_of_a_module_that_is_not_there_is_refused(tiny_model: Path, gpt2_model: Path):
    with pytest.raises(AdapterError, match="the base model has no module"):
        adapted(Workbench(), tiny_model, products(gpt2_model, [2]))


def test_after_a_refusal_the_base_is_untouched(tiny_model: Path):
    bench, good = Workbench(), products(tiny_model, [2])
    (_, bad), *_ = products(tiny_model, [2])
    half = AdapterState(bad.schema.part("A"), bad.part("A").values)
    with pytest.raises(AdapterError):
        adapted(bench, tiny_model, [*good, ("half", half)])
    assert same(weights(adapted(bench, tiny_model)), bare(tiny_model))


# What is added


@pytest.mark.parametrize("which", ["tiny_model", "gpt2_model"])
def test_the_weights_are_those_of_a_dense_sum(which: str, request: pytest.FixtureRequest):
    directory: Path = request.getfixturevalue(which)
    change = products(directory, [1, 5, 3])
    found = weights(adapted(Workbench(), directory, change))
    expected, touched = bare(directory), set[str]()
    for _, state in change:
        for module, product in dense(state).items():
            touched.add(f"{module}.weight")
            turned = product.T if which == "gpt2_model" else product
            expected[f"{module}.weight"] = expected[f"{module}.weight"].double() + SCALE * turned
    shapes = {tuple(expected[name].shape) for name in touched}
    assert any(rows != columns for rows, columns in shapes)
    for name, tensor in expected.items():
        if name in touched:
            torch.testing.assert_close(found[name].double(), tensor, atol=1e-5, rtol=0)
        else:
            assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("which", ["tiny_model", "gpt2_model", "embedded_model"])
@pytest.mark.parametrize("rest_rank", [0, 2])
def test_the_changed_base_is_the_combined_adapter_on_the_unchanged_one(
    which: str, rest_rank: int, request: pytest.FixtureRequest
):
    directory: Path = request.getfixturevalue(which)
    change = products(directory, [2, 4], size=0.03)
    model = adapted(Workbench(), directory, change, rest_rank=rest_rank)
    (_, own), *_ = products(directory, [3 + rest_rank], size=0.05)
    model.load(own)
    whole = combined(own, [state for _, state in change])
    settings = at_rank(LORA, whole.schema.rank)
    plain = adapted(Workbench(), directory, settings=settings)
    assert not torch.allclose(logits(model), logits(plain), atol=1e-3)
    plain.load(whole)
    torch.testing.assert_close(logits(model), logits(plain), atol=2e-4, rtol=1e-4)


def test_a_head_that_shares_the_embeddings_weights_leaves_those_alone(embedded_model: Path):
    settings = LORA.model_copy(update={"target_modules": ("lm_head",)})
    change = products(embedded_model, [2], settings)
    network = adapted(Workbench(), embedded_model, change, settings=settings).base.network
    before = bare(embedded_model)["model.embed_tokens.weight"]
    assert torch.equal(network.get_parameter("model.embed_tokens.weight"), before)
    head = network.get_submodule("lm_head").get_submodule("base_layer").get_parameter("weight")
    expected = before.double() + SCALE * dense(change[0][1])["lm_head"]
    torch.testing.assert_close(head.double(), expected, atol=1e-5, rtol=0)


def test_products_below_a_step_of_bfloat16_add_up(tiny_model: Path):
    """Added one by one to bfloat16 weights, most of each would be rounded away every time."""
    (_, one), *_ = products(tiny_model, [1], size=0.01)
    change = [(f"digest {number}", one) for number in range(64)]
    bench, before = Workbench(), bare(tiny_model)
    for count in range(1, 64):
        adapted(bench, tiny_model, change[:count], dtype="bfloat16")
    found = weights(adapted(bench, tiny_model, change, dtype="bfloat16"))
    error, naive_error, moved = 0.0, 0.0, 0.0
    for module, product in dense(one).items():
        naive = start = before[f"{module}.weight"].bfloat16()
        for _ in change:
            naive = naive + (SCALE * product).bfloat16()
        exact = start.double() + 64 * SCALE * product
        error += float((found[f"{module}.weight"].double() - exact).square().sum())
        naive_error += float((naive.double() - exact).square().sum())
        moved += float((exact - start.double()).square().sum())
    assert (error / moved) ** 0.5 < 0.1
    assert (naive_error / moved) ** 0.5 > 0.5


# Another list


def test_a_longer_list_adds_what_is_new_and_does_not_load_again(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    loads: list[Path] = []

    def counted(directory: Path, **options: Any) -> Any:
        loads.append(directory)
        return load_base(directory, **options)

    monkeypatch.setattr("fedpeft.models.workbench.load_base", counted)
    bench, change = Workbench(), products(tiny_model, [2, 1, 3])
    for count in (0, 1, 1, 3, 3):
        model = adapted(bench, tiny_model, change[:count])
    # A lower rank at the same scale, as a clinic of another rank in one simulation has it.
    model = adapted(bench, tiny_model, change, settings=at_rank(LORA, 2))
    assert len(loads) == 1
    at_once = weights(adapted(Workbench(), tiny_model, change))
    assert same(weights(model), at_once)


@pytest.mark.parametrize(
    ("first", "then"), [([0, 1], []), ([0, 1], [0]), ([0, 1], [1]), ([0, 1], [1, 0])]
)
def test_another_list_begins_with_the_base_as_it_is_in_the_files(
    tiny_model: Path, first: list[int], then: list[int]
):
    bench, all_products = Workbench(), products(tiny_model, [2, 1])
    adapted(bench, tiny_model, [all_products[at] for at in first])
    model = adapted(bench, tiny_model, [all_products[at] for at in then])
    expected = weights(adapted(Workbench(), tiny_model, [all_products[at] for at in then]))
    assert same(weights(model), expected)
    assert same(expected, bare(tiny_model)) is (not then)


def test_another_scale_is_another_change(tiny_model: Path):
    bench, change = Workbench(), products(tiny_model, [2])
    adapted(bench, tiny_model, change)
    other = LORA.model_copy(update={"alpha": 8.0})
    found = weights(adapted(bench, tiny_model, change, settings=other))
    assert same(found, weights(adapted(Workbench(), tiny_model, change, settings=other)))
