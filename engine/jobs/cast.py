"""Who is who in a job, as it was named: its masks, and the pictures beside the first one."""

from engine.errors import BadRequest
from engine.jobs.body import Fields
from engine.jobs.job import Cast, Draft, Given, GivenReference, MediumKind
from engine.jobs.medium import read_medium
from engine.jobs.pick import pick
from engine.jobs.served import Served, check_references, refuse_foreign

MASKS = "mask_url, mask_path or mask_base64"  # how requests bring a driving mask
_FURTHER: tuple[tuple[str, MediumKind], ...] = (
    ("reference_url", "url"),
    ("reference_path", "path"),
    ("reference_base64", "base64"),
)


def read_cast(fields: Fields, workflow: Draft | None, served: Served) -> tuple[Cast, list[str]]:
    """Reads masks and further pictures, and names the fields that are ignored for others.

    A field beats the workflow, and any further picture all of its. Raises `BadRequest` for fields
    that the model that is served does not understand, and for more pictures than it takes.
    """
    refuse_foreign(_bound(fields), served)
    mask, of_mask = pick(fields, "mask")
    reference_mask, of_reference = pick(fields, "reference_mask")
    references, of_references = _references(fields)
    if workflow is not None:
        mask = mask or _named("mask", workflow.mask)
        reference_mask = reference_mask or _named("reference_mask", workflow.reference_mask)
        references = references or [
            GivenReference(
                read_medium(f"workflow.references.{place}", "path", picture),
                _named(f"references.{place}.mask", its_mask),
            )
            for place, (picture, its_mask) in enumerate(workflow.references)
        ]
    check_references(len(references))
    cast = Cast(mask, reference_mask, tuple(references))
    return cast, [*of_mask, *of_reference, *of_references]


def _bound(fields: Fields) -> list[str]:
    """Names the fields that are given and that one kind of model alone may understand."""
    names = [name for name in Fields.model_fields if getattr(fields, name) is not None]
    return sorted(names, key=lambda name: name == "align")  # a mask says more


def _named(part: str, name: str | None) -> Given | None:
    return None if name is None else read_medium(f"workflow.{part}", "path", name)


def _references(fields: Fields) -> tuple[list[GivenReference], list[str]]:
    """Reads the further pictures: the objects of `references`, then the plain ones."""
    found: list[GivenReference] = []
    said: list[str] = []
    for place, record in enumerate(fields.references or ()):
        shown = f"references.{place}."
        image, of_image = pick(record, "", shown=shown)
        mask, of_mask = pick(record, "mask", shown=shown)
        if image is None:
            raise BadRequest(f"references.{place} names no picture; send its url, path or base64.")
        found.append(GivenReference(image, mask))
        said += [*of_image, *of_mask]
    for field, kind in _FURTHER:
        texts = getattr(fields, field) or ()
        found += [
            GivenReference(read_medium(f"{field}.{place}", kind, text))
            for place, text in enumerate(texts)
        ]
    return found, said
