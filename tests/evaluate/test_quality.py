"""What prior, two priors and guidance find in made-up sets."""

from made_up import other_background, shown, verdicts
from mini_dalle2.evaluate.quality import GUIDANCE


def test_fig8_tells_what_is_so_from_its_converse(synthetic):
    rows = [shown(synthetic, right=right) for right in (0, 12, None)]
    for (a, b, c), said in ((rows, "yes"), (rows[::-1], "no")):
        assert (
            verdicts(
                synthetic,
                "fig8",
                {
                    "nothing": a,
                    "z_txt as z_img": rows[0],
                    "z_txt, centred": b,
                    "z_img from the prior": c,
                },
            )
            == [said] * 4
        )


def test_priors_and_guidance_tell_what_is_so_from_its_converse(synthetic):
    true, empty, poor = (shown(synthetic, right=right) for right in (None, 0, 12))
    diverse, same = shown(synthetic, 12, change=other_background), shown(synthetic, 12)
    a, b = "unCLIP, diffusion prior", "GLIDE"
    for (a, b), said in (((a, b), ["yes", "no", "yes"]), ((b, a), ["no", "yes", "no"])):
        assert (
            verdicts(
                synthetic,
                "priors",
                {(a, False): true, (a, True): diverse, (b, False): poor, (b, True): same},
            )
            == said
        )
    for worst, again, said in (
        (empty, same, ["yes", "yes", "cannot tell"]),
        (true, same, ["cannot tell", "cannot tell", "yes"]),
    ):
        for a, b in (("unCLIP", "GLIDE"), ("GLIDE", "unCLIP")):
            made = {
                (model, scale, second): (true, diverse)[second]
                for model in (a, b)
                for scale in GUIDANCE
                for second in (False, True)
            }
            made |= {(b, GUIDANCE[-1], False): worst, (b, GUIDANCE[-1], True): again}
            assert verdicts(synthetic, "guidance", made) == [
                {"yes": "no"}.get(word, word) if b == "unCLIP" else word for word in said
            ]
