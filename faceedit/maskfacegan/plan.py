# SPDX-License-Identifier: Apache-2.0
"""What an edit asks for, as regions and terms: `faceedit.relations.MASKFACEGAN_REGIONS` applied to a request."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from faceedit.attributes import CELEBA, check_attribute, complete_request
from faceedit.errors import OutOfRangeError, UnknownNameError, UsageError, suggestion
from faceedit.labels import MASKFACEGAN
from faceedit.maskfacegan.config import MaskFaceGANConfig
from faceedit.relations import MASKFACEGAN_REGIONS, RegionRule, maskfacegan_region

COMPONENTS: tuple[str, ...] = ("mouth", "eyebrows", "eyes", "hair", "nose", "ears")
"""Classes of the MaskFaceGAN scheme that an edit may change; the others are only kept or left alone."""

HAIR_COLOURS = ("Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair")
HAIR_SHAPES = ("Straight_Hair", "Wavy_Hair")


@dataclass(frozen=True, slots=True)
class EditPlan:
    """One edit of one image, resolved.

    values:       attribute -> intensity in [0, 1]; 0 removes it.
    keep:         attributes that stay as the classifier sees them in the input.
    target:       classes that are edited, S_tar.
    appearance:   classes whose look is kept, S_skin.
    blend:        classes of the input that the generated image replaces, B.
    shape:        classes whose outline is kept; () where λ_S is 0.
    component, scale:  the class whose size is set and α; scale 0 leaves sizes alone.
    is_dynamic:       the edited region may grow over what is kept while masks follow the edit.
    grows_shape:      the kept outline grows with the edit as well (hair shape).
    follows:          classes blended in where the generated image has them (paper, eq. 12).
    is_global:        the whole face: perceptual appearance, no shape term, nothing dynamic.
    """

    values: Mapping[str, float]
    keep: tuple[str, ...]
    target: tuple[str, ...]
    appearance: tuple[str, ...]
    blend: tuple[str, ...]
    shape: tuple[str, ...] = ()
    component: str = ""
    scale: float = 0.0
    is_dynamic: bool = True
    grows_shape: bool = False
    follows: tuple[str, ...] = ()
    is_global: bool = False

    @property
    def attributes(self) -> tuple[str, ...]:
        """The K attributes of the semantic term: those asked for, then those kept."""
        return (*self.values, *self.keep)

    @property
    def parts(self) -> tuple[str, ...]:
        """Classes, in id order, in which the edit may show."""
        return _ordered({*self.blend, *self.follows})


def make_plan(
    values: Mapping[str, float],
    *,
    component: str = "",
    scale: float = 0.0,
    keep: Collection[str] = (),
    config: MaskFaceGANConfig | None = None,
) -> EditPlan:
    """The plan of one edit.

    Args:    values, attribute -> intensity in [0, 1], several at once; component, scale, a class of `COMPONENTS` (or a
             local attribute, standing for its class) and how large it shall be, 1 as it is; keep, attributes to hold at
             what the classifier sees, "hair" for the other hair attributes (colours while the shape is edited, shape
             while the colour is, both while the whole face is, none where the hair is not reached); force_global, treat
             local attributes as ones of the whole face.
    Returns: a plan that is global when any of its attributes is: regions, shape and dynamic masks are then the face's.
    Raises:  UnknownAttributeError, UnknownNameError for the component, OutOfRangeError, UsageError when nothing is
             asked for, attributes exclude each other, or a global edit sets a size.
    """
    config = config or MaskFaceGANConfig()
    complete_request(values, CELEBA)  # refuses unknown names and contradictions; nothing is added to the request
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise OutOfRangeError(f"make_plan: {name} must be between 0 and 1, got {value:g}; 1 sets it fully")
    if not values and not component:
        raise UsageError("make_plan: an edit must set an attribute or a size, got neither; set e.g. Smiling=1")
    component = _component(component)
    if component and not 0.0 < scale < 4.0:
        raise OutOfRangeError(f"make_plan: scale must lie between 0 and 4, got {scale:g}; 1 keeps the size")
    rules = {name: maskfacegan_region(name) for name in values}
    is_global = config.force_global or any(rule.is_global for rule in rules.values())
    kept = _kept(keep, values, is_global)
    if is_global:
        if component:
            raise UsageError(
                f"make_plan: a size must go with local attributes, got {component} with {', '.join(values)}; "
                "set them in two edits"
            )
        face = maskfacegan_region("Male")  # every global attribute has the same rule
        return EditPlan(
            dict(values), kept, face.target, face.appearance, face.appearance, is_dynamic=False, is_global=True
        )
    return _local_plan(values, kept, list(rules.values()), component, scale, config)


def _local_plan(
    values: Mapping[str, float],
    kept: tuple[str, ...],
    rules: list[RegionRule],
    component: str,
    scale: float,
    config: MaskFaceGANConfig,
) -> EditPlan:
    target = {label for rule in rules for label in rule.target} | ({component} if component else set())
    extra = {label for rule in rules for label in rule.appearance}
    held = {label for rule in rules if rule.shape_weight > 0 for label in (*rule.target, *rule.appearance)}
    grows = any(rule.updates_shape for rule in rules)
    generated = config.hair_blend == "generated"
    moved = {label for rule in rules if rule.updates_shape and generated for label in rule.target}
    appearance = {"skin"} | (extra - target)
    blend = (target | extra | ({"skin"} if config.blend == "skin" else set())) - moved
    # Without the skin around it, a mouth that grew would be cut off along its old outline.
    follows = moved | target if config.blend == "targets" else moved
    return EditPlan(
        values=dict(values),
        keep=kept,
        target=_ordered(target),
        appearance=_ordered(appearance),
        blend=_ordered(blend),
        # A component whose size is set must be free to change its outline.
        shape=_ordered(held - {component}),
        component=component,
        scale=scale if component else 0.0,
        is_dynamic=config.dynamic,
        grows_shape=grows,
        follows=_ordered(follows),
    )


def target_probability(intensity: float, epsilon: float) -> float:
    """The probability asked of the classifier: 1 - ε for 1, ε for 0 (paper, eq. 3), on a line between."""
    return epsilon + intensity * (1.0 - 2.0 * epsilon)


def _component(name: str) -> str:
    if not name or name in COMPONENTS:
        return name
    if name in MASKFACEGAN_REGIONS:
        return MASKFACEGAN_REGIONS[name].target[0]
    raise UnknownNameError(
        f"make_plan: component must be a part that can be edited, got {name!r}; {suggestion(name, COMPONENTS)}"
    )


def _kept(keep: Collection[str], values: Mapping[str, float], is_global: bool) -> tuple[str, ...]:
    names: list[str] = []
    for name in keep:
        if name != "hair":
            names.append(check_attribute(name, (*CELEBA, "hair")))
            continue
        edits_shape = any(value in HAIR_SHAPES for value in values)
        edits_colour = any(value in HAIR_COLOURS for value in values)
        if edits_shape and edits_colour:
            raise UsageError(
                "make_plan: keep must leave something of the hair to hold, got hair while shape and colour are set; "
                "leave it out"
            )
        # An edit of another part does not reach the hair: there is nothing to hold.
        names += HAIR_COLOURS if edits_shape or (is_global and not edits_colour) else ()
        names += HAIR_SHAPES if edits_colour or (is_global and not edits_shape) else ()
    return tuple(name for name in dict.fromkeys(names) if name not in values)


def _ordered(labels: Collection[str]) -> tuple[str, ...]:
    return tuple(label for label in MASKFACEGAN.classes if label in labels)
