# SPDX-License-Identifier: Apache-2.0
"""The MagGAN and classifier tasks at a size that trains in seconds."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.toy_task import FakeFace

from faceedit import training
from faceedit.attributes import MAGGAN
from faceedit.errors import OutOfRangeError, WeightsError
from faceedit.networks.classifier import AttributeClassifier, AttributeClassifierConfig
from faceedit.registry import load_network, read_header, save_weights
from faceedit.training.checkpoint import load_checkpoint
from faceedit.training.classifier import ClassifierTask, PlacementConfig, place_at_random
from faceedit.training.config import to_yaml
from faceedit.training.losses import moved_pixels
from faceedit.training.maggan import LossConfig, MagGANTask, photo_edits
from faceedit.training.synthetic import SUPPORTED_ATTRIBUTES
from faceedit.training.task import TrainingContext
from faceedit.training.trainer import make_fabric, seed_step
from faceedit.training.transplants import TransplantConfig


def quiet(line: str) -> None:
    """A report that keeps test output readable."""


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def tiny_maggan(cache_dir: Path, *more: str) -> Any:
    overrides = [
        "trainer={steps: 6, accelerator: cpu, progress_by: steps, cpu_threads: 1, log_every: 2, checkpoint_every: 0}",
        "trainer={sample_every: 0, validate_every: 0}",
        "network={size_px: 32, base_width: 8, max_width: 16, encoder_stages: 3, stu_units: 2, spade_width: 8}",
        "critic={input_px: 16, base_width: 8, max_width: 16, stages: 2, head_width: 8}",
        f"synthetic={{size_px: 32, people: 8, variants: 2, cache_dir: {cache_dir}}}",
        "batch={pairs: 4, copies: 1, photos: 2, photo_edits: 1}",
        "adversarial={start_step: 0, every: 2, critic_steps: 2}",
        "validation_people=1",
    ]
    return training.resolve("maggan-starter", [*overrides, *more])


def build(recipe: Any, task_type: Any) -> Any:
    task_type.prepare(recipe, report=quiet)
    seed_step(recipe.trainer, -1, 0)
    return task_type(recipe, TrainingContext(make_fabric(recipe.trainer), recipe.trainer))


@pytest.fixture
def photo_recipe(cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A recipe with photos whose faces are found by a stand-in, so that no parser weights are needed."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(b"x")
    monkeypatch.setattr("faceedit.training.photos.face_finder", lambda parser: lambda path: FakeFace(int(path.stem)))
    return tiny_maggan(cache_dir, f"photos={{folder: {folder}, size_px: 32, cache_dir: {tmp_path / 'cache'}}}")


def _copy(gradient: torch.Tensor | None) -> torch.Tensor | None:
    return None if gradient is None else gradient.clone()


def test_every_parameter_gets_a_finite_gradient(photo_recipe: Any) -> None:
    task = build(photo_recipe, MagGANTask)
    # The last layer of the detail is zero at the start, so what lies before it learns from the second step on.
    torch.nn.init.normal_(task.context.networks["generator"].detail.layer.weight, std=0.1)
    gradients: dict[str, dict[str, torch.Tensor | None]] = {}
    plain = task.context.minimise

    def minimise(name: str, loss: torch.Tensor, **options: Any) -> None:
        plain(name, loss, **options)
        network = task.context.networks[name]
        gradients[name] = {key: _copy(p.grad) for key, p in network.named_parameters() if p.requires_grad}

    task.context.minimise = minimise
    task.training_step(task.batch(0), 0)
    assert gradients.keys() == {"generator", "critic"}
    for name, found in gradients.items():
        for key, gradient in found.items():
            assert gradient is not None, (name, key)
            assert gradient.isfinite().all(), (name, key)
            # E D(x̂) − E D(x) does not depend on the critic's last bias.
            assert gradient.abs().sum() > 0 or key.endswith("critic.2.bias"), (name, key)


def test_generator_overfits_one_batch(cache_dir: Path) -> None:
    recipe = tiny_maggan(cache_dir, "generator_adam.rate=0.002", "generator_adam.warmup_steps=0")
    task = build(replace(recipe, adversarial=replace(recipe.adversarial, start_step=10**6)), MagGANTask)
    batch = task.batch(0)
    task.context.set_rates(0, 0.0)
    losses = [task.training_step(batch, step)["generator"].item() for step in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_pair_critic_learns_from_the_first_step_and_is_heard_from_the_start_step_on(cache_dir: Path) -> None:
    pair_critic = "pair_critic={base_width: 4, max_width: 8, stages: 2}"
    task = build(
        tiny_maggan(cache_dir, pair_critic, "losses.pairs=5", "adversarial={start_step: 1, every: 1}"), MagGANTask
    )
    before = [weight.clone() for weight in task.context.networks["pair_critic"].parameters()]
    unheard, heard = (task.training_step(task.batch(step), step) for step in (0, 1))
    assert "pair_critic" in unheard
    assert "pairs" not in unheard
    assert {"pair_critic", "pairs"} <= heard.keys()
    after = task.context.networks["pair_critic"].parameters()
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert "pair_critic" not in build(tiny_maggan(cache_dir), MagGANTask).context.networks
    with pytest.raises(OutOfRangeError, match=r"pair_critic\.stages must be few enough to halve 32 px, got 6"):
        build(tiny_maggan(cache_dir, "losses.pairs=5", "pair_critic.stages=6"), MagGANTask)


def test_critic_runs_on_its_schedule(cache_dir: Path) -> None:
    task = build(tiny_maggan(cache_dir, "adversarial={start_step: 1, every: 2, critic_steps: 3}"), MagGANTask)
    updates: list[str] = []
    plain = task.context.minimise
    task.context.minimise = lambda name, loss: (updates.append(name), plain(name, loss))
    scalars = [task.training_step(task.batch(step), step) for step in range(4)]
    assert updates == ["generator", *["critic"] * 3, "generator", "generator", *["critic"] * 3, "generator"]
    assert ["penalty" in values for values in scalars] == [False, True, False, True]


def test_several_patch_levels_train(cache_dir: Path) -> None:
    critic = "critic={input_px: 16, base_width: 8, max_width: 8, stages: 2, head_width: 8, is_pooled: true, levels: 2}"
    task = build(tiny_maggan(cache_dir, critic), MagGANTask)
    scalars = task.training_step(task.batch(0), 0)
    assert all(value.isfinite() for value in scalars.values())


def test_maggan_run_resumes_exports_and_loads(photo_recipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(photo_recipe))
    half = ["trainer.precision=bf16-mixed", "trainer.checkpoint_every=3", "trainer.keep_checkpoints=9"]
    whole = training.run(path, half, output_dir=tmp_path / "whole", report=quiet)
    assert whole is not None
    assert whole.weights is not None
    middle = tmp_path / "whole" / "checkpoints" / "step_00000003.pt"
    resumed = training.run(path, half, output_dir=tmp_path / "resumed", resume=middle, report=quiet)
    assert resumed is not None
    one, other = (load_checkpoint(result.checkpoint)["context"]["networks"] for result in (whole, resumed))
    for name in one:
        for key in one[name]:
            assert torch.equal(one[name][key], other[name][key]), (name, key)
    assert resumed.metrics == whole.metrics
    network: Any = load_network(whole.weights)
    assert network.config == photo_recipe.network
    assert network.header.attributes == MAGGAN
    assert network.header.metrics["psnr_db"] == pytest.approx(whole.metrics["psnr_db"])
    image = torch.zeros(1, 3, 32, 32)
    mask = torch.zeros(1, 19, 32, 32).index_fill_(1, torch.tensor(13), 1.0)
    assert network(image, torch.ones(1, 13), mask).shape == (1, 3, 32, 32)


def _classifier_of_the_13(folder: Path, seed: int = 0, gain: float = 1.0) -> str:
    torch.manual_seed(seed)
    config = AttributeClassifierConfig(attributes=MAGGAN[::-1], size_px=32, base_width=8, stages=3, hidden_width=32)
    network, path = AttributeClassifier(config), folder / f"classifier-{seed}.safetensors"
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)  # above 1 pictures change the opinion, and not only its own bias says it
    facts = {"licence": "Apache-2.0", "training_data": "none", "source": "tests"}
    save_weights(path, "attribute-classifier", config, network.state_dict(), half=False, **facts)
    return str(path)


def test_transplants_and_features_join_the_step(
    photo_recipe: Any, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photos with a known result stand behind the synthetic pairs, and every pair is compared in features."""
    monkeypatch.setattr(MagGANTask, "_estimate_attributes", lambda self: torch.zeros(len(self.photos), 13))
    recipe = replace(
        photo_recipe,
        photo_classifier="unused",
        batch=replace(photo_recipe.batch, transplants=3),
        pairs=replace(photo_recipe.pairs, idle_share=0.0),
        transplants=TransplantConfig(attributes=("Eyeglasses", "Bushy_Eyebrows"), removal_share=0.0),
        synthetic=replace(photo_recipe.synthetic, people=32),
        feature_network=_classifier_of_the_13(tmp_path),
        losses=replace(photo_recipe.losses, features=10.0, classes=2.0),
    )
    task = build(recipe, MagGANTask)
    batch = task.batch(0)
    assert batch["source"].shape[0] == batch["influence"].shape[0] == 4 + 3
    added = batch["difference"][4:]
    assert (added.sum(1) == 1).all()
    assert added[:, [MAGGAN.index("Eyeglasses"), MAGGAN.index("Bushy_Eyebrows")]].sum() == 3
    scalars = task.training_step(batch, 0)
    assert all(value.isfinite() for value in scalars.values())
    assert scalars["features"] > 0.5
    assert scalars["classes"] > 0
    assert not task.features.layers.training
    assert all(parameter.grad is None for parameter in task.features.layers.parameters())


def test_classes_pull_an_edit_towards_what_is_asked(cache_dir: Path, tmp_path: Path) -> None:
    """With no other term, the frozen classifiers' own opinion of the edits rises, each is asked, and none changes."""
    judges = [_classifier_of_the_13(tmp_path, seed, gain=1.8) for seed in (0, 1)]
    others = [term.name for term in fields(LossConfig) if term.name != "classes"]
    none = ", ".join(f"{name}: 0" for name in others)
    still = "class_views={shift: 0, scale: 0, degrees: 0, blur_share: 0}"
    asked = (f"class_networks=[{','.join(map(str, judges))}]", f"losses={{{none}, classes: 1}}", still)
    more = ("generator_adam={rate: 0.003, beta1: 0.9, warmup_steps: 0}", "adversarial.start_step=99")
    task = build(tiny_maggan(cache_dir, *asked, *more), MagGANTask)
    networks = [network for network, _ in task.classes.networks]
    order: list[int] = []
    for place, network in enumerate(networks):
        network.register_forward_hook(lambda *_, place=place: order.append(place))
    before = [[parameter.clone() for parameter in network.parameters()] for network in networks]
    batch = task.batch(0)
    found = [task.training_step(batch, step)["classes"].item() for step in range(40)]
    for place in range(len(networks)):
        opinions = [value for value, asked_place in zip(found, order, strict=True) if asked_place == place]
        assert len(opinions) > 5
        assert opinions[-1] < opinions[0] - 0.005
    for network, parameters in zip(networks, before, strict=True):
        assert all(map(torch.equal, parameters, network.parameters()))


def test_classes_need_a_classifier_of_all_attributes(cache_dir: Path, tmp_path: Path) -> None:
    few = AttributeClassifierConfig(attributes=("Bald", "Young"), size_px=32, base_width=8, stages=3, hidden_width=32)
    path = tmp_path / "few.safetensors"
    facts = {"licence": "Apache-2.0", "training_data": "none", "source": "tests"}
    save_weights(path, "attribute-classifier", few, AttributeClassifier(few).state_dict(), half=False, **facts)
    recipe = tiny_maggan(cache_dir, f"feature_network={path}", "losses.classes=1")
    with pytest.raises(OutOfRangeError, match="feature_network must be classifiers of MagGAN's attributes"):
        build(recipe, MagGANTask)


def test_transplants_need_photos_of_known_attributes(cache_dir: Path) -> None:
    with pytest.raises(OutOfRangeError, match=r"batch.transplants must be 0 without photos"):
        tiny_maggan(cache_dir, "batch.transplants=2")


def test_precisions_that_round_the_weights_are_refused(cache_dir: Path) -> None:
    for precision in ("bf16-true", "64-true"):
        with pytest.raises(OutOfRangeError, match="precision must be 32-true or bf16-mixed or 16-mixed in this task"):
            tiny_maggan(cache_dir, f"trainer.precision={precision}")


def test_photo_edits_flip_one_known_attribute() -> None:
    attributes = torch.zeros(64, 13)
    black, blond = MAGGAN.index("Black_Hair"), MAGGAN.index("Blond_Hair")
    attributes[:, black] = 0.9
    attributes[:, MAGGAN.index("Male")] = 0.6
    batch = photo_edits(64, attributes, torch.Generator().manual_seed(0))
    difference = batch["photo_difference"]
    present = (attributes > 0.5).float()
    assert torch.equal(batch["photo_target_attributes"], present + difference)
    dyed = difference[:, blond] == 1
    assert dyed.any()
    assert (difference[dyed][:, black] == -1).all()
    assert ((difference != 0).sum(1) <= 2).all()
    # A guess counts only where it is the bit that the edit sets.
    male = MAGGAN.index("Male")
    assert torch.equal(batch["photo_known"][:, male], (difference[:, male] != 0).float())
    blind = photo_edits(64, None, torch.Generator().manual_seed(0))
    assert blind.keys() == {"photo_difference"}
    assert (blind["photo_difference"].abs().sum(1) == 1).all()


def tiny_classifier(cache_dir: Path, *more: str) -> Any:
    return training.resolve(
        "classifier-starter",
        [
            "trainer={steps: 4, accelerator: cpu, cpu_threads: 1, checkpoint_every: 0, sample_every: 0}",
            "trainer={progress_by: steps, validate_every: 0}",
            "network={size_px: 32, base_width: 8, stages: 3, hidden_width: 32,"
            " attributes: [Blond_Hair, Male, Smiling]}",
            f"synthetic={{size_px: 32, people: 16, variants: 2, tinted_share: 0.5, cache_dir: {cache_dir}}}",
            "adam={rate: 0.003, beta1: 0.9}",
            "batch_size=8",
            "validation_people=8",
            *more,
        ],
    )


def test_classifier_overfits_and_ignores_the_colours_of_tinted_people(cache_dir: Path) -> None:
    task = build(tiny_classifier(cache_dir), ClassifierTask)
    batch = task.batch(0)
    tinted = batch["weight"][:, 0] == 0
    assert 0 < tinted.sum() < 8
    assert (batch["weight"][:, 1:] == 1).all()
    losses = [task.training_step(batch, step)["loss"].item() for step in range(40)]
    assert losses[-1] < 0.3 * losses[0]


def test_classifier_run_exports_what_loads(cache_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(tiny_classifier(cache_dir)))
    result = training.run(path, output_dir=tmp_path / "run", report=quiet)
    assert result is not None
    assert {"accuracy", "flip", "accuracy_maggan", "accuracy_Male"} <= result.metrics.keys()
    network: Any = load_network(result.weights or "")
    assert network.config.attributes == ("Blond_Hair", "Male", "Smiling")
    goes_on = build(tiny_classifier(cache_dir, f"initial_weights={result.weights}"), ClassifierTask)
    for key, value in goes_on.context.networks["classifier"].state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), key


def test_weights_name_all_that_they_were_trained_on(cache_dir: Path, tmp_path: Path) -> None:
    """People of the run and, once each, those of the runs before."""
    said, path = [], None
    for people in (8, 12, 12, 8):
        start = "initial_weights=null" if path is None else f"initial_weights={path}"
        task = build(tiny_classifier(cache_dir, f"synthetic.people={people}", start), ClassifierTask)
        path = tmp_path / f"{len(said)}.safetensors"
        task.export(path, {})
        said.append(read_header(path).training_data)
    own = {people: said[0].replace("8", str(people)) for people in (8, 12)}
    after = f"{own[12]}; before that: {own[8]}"
    assert said == [own[8], after, after, f"{own[8]}; before that: {own[12]}"]


def test_weights_of_another_size_are_refused_in_one_line(cache_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_classifier(cache_dir, f"initial_weights={_classifier_of_the_13(tmp_path)}")
    with pytest.raises(WeightsError, match=r"initial_weights must fit the recipe's network, got .*logits") as caught:
        build(recipe, ClassifierTask)
    assert "\n" not in str(caught.value)


def test_only_attributes_that_drawings_show_are_learned(cache_dir: Path, tmp_path: Path) -> None:
    """Any other is absent in every drawing; not to find it would count as perfect."""
    with pytest.raises(OutOfRangeError, match=r"network\.attributes must be ones that .*, got \['Blurry'\]"):
        tiny_classifier(cache_dir, "network.attributes=[Blurry, Male]")
    with pytest.raises(OutOfRangeError, match=r"network\.attributes must be one or more names"):
        tiny_classifier(cache_dir, "network.attributes=[]")
    for task in ("classifier", "attribute-tree", "attribute-cnn"):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"task: {task}\ntrainer: {{steps: 1}}\n")
        recipe: Any = training.resolve(path)
        assert set(recipe.network.attributes) == set(SUPPORTED_ATTRIBUTES)
    assert len(AttributeClassifierConfig().attributes) == 40, "what other people's weights know"


def test_placement_without_spread_changes_nothing() -> None:
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    still = place_at_random(image, PlacementConfig(0, 0, 0, 0), torch.Generator().manual_seed(0))
    moved = place_at_random(image, PlacementConfig(), torch.Generator().manual_seed(0))
    assert torch.allclose(still, image, atol=1e-5)
    assert (moved - image).abs().mean() > 0.05


def test_moved_weighs_what_the_true_edit_changes() -> None:
    source = torch.zeros(1, 3, 4, 4)
    target = source.clone()
    target[..., 0, 0] = 0.5  # clearly moved
    target[..., 0, 1] = 0.05  # half way to counting
    weight = moved_pixels(source, target)
    assert weight.shape == (1, 1, 4, 4)
    assert weight[0, 0, 0, 0] == 1
    torch.testing.assert_close(weight[0, 0, 0, 1], torch.tensor(0.5))
    assert weight.sum() == pytest.approx(1.5)


def test_a_run_goes_on_from_exported_weights(cache_dir: Path, tmp_path: Path) -> None:
    path, residual = tmp_path / "recipe.yaml", "network.output=residual"
    path.write_text(to_yaml(tiny_maggan(cache_dir, residual)))
    first = training.run(path, ["trainer.steps=1"], output_dir=tmp_path / "first", report=quiet)
    assert first is not None
    task = build(tiny_maggan(cache_dir, residual, f"initial_weights={first.weights}"), MagGANTask)
    exported = load_network(first.weights, kind="maggan").state_dict()
    for key, value in task.context.networks["generator"].state_dict().items():
        assert torch.equal(value, exported[key]), key
    finer = build(tiny_maggan(cache_dir, f"initial_weights={first.weights}", "network.output=layered"), MagGANTask)
    continued = finer.context.networks["generator"].state_dict()
    assert all(torch.equal(continued[key], value) for key, value in exported.items())
    assert len(continued) > len(exported)
