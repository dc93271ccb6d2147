"""compress: argv -> a request for one basis under all domains."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import Screen
from ..options import AsJson, BankPath, Resume
from ..values import open_bank


def compress(
    bank: BankPath,
    out: Annotated[Path, typer.Option(help="The folder of the new bank.")],
    keep: Annotated[
        float | None,
        typer.Option(
            help="Share of the adapters' numbers to keep, e.g. 0.5; with --uniform of the ranks."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Instead: of all domains' adapters together, 300kB, 80000 numbers, or 5% of the "
            "backbone."
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(help="Instead: accuracy a domain may lose on validation images, e.g. 0.01."),
    ] = None,
    share: Annotated[
        str, typer.Option(help="The side that domains share: input, output or both.")
    ] = "input",
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform", help="The same share of ranks wherever that is smaller (the paper)."
        ),
    ] = False,
    tune: Annotated[
        list[str] | None,
        typer.Option(metavar="DOMAIN=SOURCE", help="Tune this domain's factors. Again for more."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="DOMAIN=SOURCE", help="Only measure this domain. Again for more."),
    ] = None,
    tune_basis: Annotated[
        bool,
        typer.Option("--tune-basis", help="First the basis, by all domains; --tune for each."),
    ] = False,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DOMAIN=FOLDER",
            help="Images without labels, to weigh errors by what they activate. Again for more.",
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of the tuning; by default 8.")] = None,
    picture: Annotated[
        bool, typer.Option("--picture/--no-picture", help="Draw accuracy against size.")
    ] = True,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Factor all domains' adapters over one shared basis, into a new bank.

    Example: onetrunk compress garden.bank --keep 0.5 --tune flowers=photos/flowers --out half.bank
    """
    from ..compressing import TUNING_EPOCHS, Request, read_pairs, run

    if epochs is not None and not tune:
        raise typer.BadParameter("it is for --tune DOMAIN=SOURCE", param_hint="--epochs")
    tuned, measured = read_pairs(tune or [], "--tune"), read_pairs(data or [], "--data")
    request = Request(
        bank=open_bank(bank),
        out=out,
        keep=keep,
        budget=budget,
        max_loss=max_loss,
        uniform=uniform,
        share=share,  # type: ignore[arg-type]
        data={**measured, **tuned},
        images=read_pairs(images or [], "--images"),
        tune=frozenset(tuned),
        tune_basis=tune_basis,
        epochs=epochs or TUNING_EPOCHS,
        picture=picture,
        resume=resume,
    )
    run(request, Screen(as_json))
