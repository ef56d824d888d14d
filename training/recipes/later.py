"""Stage 3 on the data sizes of later InternVL-Chat models, in the simple configuration.

Numbers are those of the published scripts (`internvl_chat/shell`). Both train the vision tower too. The mixtures
themselves are not published whole; the steps are those of as many dialogues.
"""

from .base import DialogueRecipe, Phase
from .full import stage3


def _check_choices(connector: str, freeze_language: bool | None, also_train: str | None) -> None:
    if connector != "patches" or freeze_language or also_train:
        raise ValueError("The later models are in the simple configuration, and all of it is trained.")


def stage3_v1_2(
    connector: str = "patches", freeze_language: bool | None = None, also_train: str | None = None
) -> DialogueRecipe:
    """1.2 M dialogues at 448 px in batches of 512 (`shell/internvl1.2`, `hermes2_yi34b`), after LLaVA's first phase.

    Args:
        connector: "patches".
        freeze_language: Not possible here.
        also_train: Likewise.

    Raises:
        ValueError: If another configuration is wanted.
    """
    _check_choices(connector, freeze_language, also_train)
    first = stage3().phases[0]  # the published script starts from a trained MLP
    rates = {"projector": 1e-5, "language": 1e-5, "vision": 1e-5}
    return DialogueRecipe(
        phases=(
            Phase("mlp", first.steps, first.learning_rates, 448, first.warmup_steps, first.batch_size),
            Phase("whole", 2_344, rates, 448, warmup_steps=71, batch_size=512),
        ),
        weight_decay=0.05,
        betas=(0.9, 0.999),
        drop_path_rate=0.4,
        grad_cache_chunk_size=8,
        template="Hermes-2",
        max_length=2048,
    )


def stage3_v2_5(
    connector: str = "patches", freeze_language: bool | None = None, also_train: str | None = None
) -> DialogueRecipe:
    """16.3 M dialogues in tiles of 448 px, packed to some 16 K tokens (`shell/internvl2.5`, stages 1, 1.5 and 2).

    A step holds 512 packs there, of which 5,500 steps see the data once; here it holds as many dialogues, six for each
    pack. The first two phases have no length there; theirs is own.

    Args:
        connector: "patches".
        freeze_language: Not possible here.
        also_train: Likewise.

    Raises:
        ValueError: If another configuration is wanted.
    """
    _check_choices(connector, freeze_language, also_train)
    rates = {"projector": 4e-5, "language": 4e-5, "vision": 4e-5}
    return DialogueRecipe(
        phases=(
            Phase("mlp", 2_000, {"projector": 2e-4}, 448, warmup_steps=100, batch_size=3_072),
            Phase("vision", 2_000, {"projector": 1e-5, "vision": 1e-5}, 448, warmup_steps=100, batch_size=6_144),
            Phase("whole", 5_306, rates, 448, warmup_steps=160, batch_size=3_072),
        ),
        weight_decay=0.05,
        betas=(0.9, 0.999),
        drop_path_rate=0.1,
        grad_cache_chunk_size=6,
        max_tiles=12,
        max_length=16_384,
        pack=True,
    )
