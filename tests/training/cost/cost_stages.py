"""Two small stages whose cost is estimated in tests."""

from diffusers_pisdm.training.cost.stage_cost import CostSettings, make_stage, stage_loss


NUM_CLASSES = 10
STAGE = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 6, "hidden_size": 64}
HIGHER_STAGE = STAGE | {"low_res_channels": 4}


def make_model(config, **settings):
    return make_stage(config, NUM_CLASSES, CostSettings(**settings))


def run_loss(model, batch_size, **settings):
    return stage_loss(model, batch_size, CostSettings(**settings))
