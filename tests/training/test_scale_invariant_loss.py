import math
import multiprocessing

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from diffusers_pisdm.training import ScaleInvariantLoss, info_nce
from diffusers_pisdm.training.scale_invariant_loss import dispersive_loss, gather_rows
from tests.support.processes import run_ranks
from tests.training.processes import objective_in_processes


def info_nce_by_loops(queries, keys, temperature, labels=None):
    """The textbook formula, one pair at a time."""
    count = len(queries)

    def one_way(from_, to):
        total = 0.0
        for i in range(count):
            kept = [j for j in range(count) if j == i or labels is None or labels[i] != labels[j]]
            scores = [(from_[i] * to[j]).sum() / temperature for j in kept]
            total = total - (scores[kept.index(i)] - torch.logsumexp(torch.stack(scores), 0))
        return total / count

    return (one_way(queries, keys) + one_way(keys, queries)) / 2


@pytest.mark.parametrize("labels", [None, [0, 1, 0, 2, 1]])
def test_value_and_gradient_equal_a_plain_loop(labels):
    torch.manual_seed(0)
    raw = [torch.randn(5, 7, requires_grad=True) for _ in range(2)]
    results = []
    for function in (info_nce_by_loops, info_nce):
        queries, keys = (F.normalize(tensor, dim=-1) for tensor in raw)
        class_labels = None if labels is None else torch.tensor(labels)
        loss = function(queries, keys, 0.1, class_labels)
        results.append((loss, *torch.autograd.grad(loss, raw)))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask_same_class", [None, True])
def test_the_loss_is_its_formula_for_every_pair_of_stages(mask_same_class):
    """Each stage with its own width and tokens, and all but the first with its own number of images."""
    torch.manual_seed(0)
    kwargs = {} if mask_same_class is None else {"mask_same_class": mask_same_class}
    loss = ScaleInvariantLoss([6, 10, 7], **kwargs).double()
    images, tokens = (5, 5, 4), (4, 9, 5)
    features = {i: torch.randn(images[i], tokens[i], width) for i, width in enumerate((6, 10, 7))}
    features = {i: (2 * values).double().requires_grad_() for i, values in features.items()}
    labels = torch.tensor([2, 0, 1, 2, 0])
    embeddings = []
    for stage in range(3):
        first, _, second = loss.heads[str(stage)]
        pooled = features[stage].sum(dim=1) / tokens[stage]
        hidden = pooled @ first.weight.T + first.bias
        hidden = hidden / (1 + torch.exp(-hidden))
        embedded = hidden @ second.weight.T + second.bias
        assert embedded.shape[1] == 256
        embeddings.append(embedded / embedded.square().sum(dim=1, keepdim=True).sqrt())
    classes = labels.tolist() if mask_same_class else None
    expected = [
        info_nce_by_loops(embeddings[0], embeddings[1], 0.1, classes),
        info_nce_by_loops(embeddings[1][:4], embeddings[2], 0.1, classes),
    ]
    actual = loss(features, labels)
    torch.testing.assert_close(actual.double(), torch.stack(expected), rtol=1e-5, atol=0)
    # The gradient reaches the features of both stages of a pair.
    gradients = torch.autograd.grad(actual @ torch.tensor([1.0, 3.0]), list(features.values()))
    expected = torch.autograd.grad(expected[0] + 3 * expected[1], list(features.values()))
    for gradient, value in zip(gradients, expected):
        torch.testing.assert_close(gradient, value, rtol=1e-4, atol=1e-6)


def test_only_counted_positives_are_averaged_and_all_others_stay_negatives():
    torch.manual_seed(0)
    queries, keys = (F.normalize(torch.randn(5, 7), dim=-1) for _ in range(2))
    counted = torch.tensor([True, False, True, True, False])
    logits = queries @ keys.T / 0.2
    rows = [-logits[i, i] + torch.logsumexp(logits[i], 0) for i in (0, 2, 3)]
    columns = [-logits[i, i] + torch.logsumexp(logits[:, i], 0) for i in (0, 2, 3)]
    torch.testing.assert_close(info_nce(queries, keys, 0.2, counted=counted), sum(rows + columns) / 6)
    assert info_nce(queries, keys, 0.2, counted=torch.zeros(5, dtype=torch.bool)) == 0


@pytest.mark.parametrize("count", [2, 5])
def test_the_dispersive_loss_is_its_formula(count):
    torch.manual_seed(0)
    features = torch.randn(count, 3, 4, requires_grad=True)
    pairs = [[torch.exp(-(a - b).square().mean() / 0.7) for a in features] for b in features]
    wanted = sum(map(sum, pairs)).div(count**2).log()
    found = dispersive_loss(features, 0.7)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, features)[0] for loss in (found, wanted)))
    assert dispersive_loss(torch.ones(count, 3)) == 0  # all alike: the largest value


def make_features(images=(5, 4), tokens=(4, 9), widths=(6, 10)):
    torch.manual_seed(0)
    return {i: torch.randn(images[i], tokens[i], widths[i], requires_grad=True) for i in range(len(images))}


def test_the_dispersive_form_is_the_mean_of_a_pairs_stages():
    features = make_features((5, 4, 3), (4, 9, 5), (6, 10, 7))
    loss = ScaleInvariantLoss([6, 10, 7], form="dispersive", temperature=0.5)
    first, second, third = (dispersive_loss(features[i], 0.5) for i in range(3))
    found = loss(features, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(found, torch.stack([(first + second) / 2, (second + third) / 2]))


def test_a_stopped_gradient_spares_the_lower_stage_alone():
    features, labels = make_features(), torch.arange(5)
    values = []
    for stop in (False, True):
        torch.manual_seed(1)
        loss = ScaleInvariantLoss([6, 10], stop_gradient=stop)
        values.append(loss(features, labels))
        lower, higher = torch.autograd.grad(values[-1].sum(), list(features.values()), allow_unused=True)
        assert (lower is None) == stop and higher.any()
    assert torch.equal(*values)


def test_noisy_images_are_no_positives_in_either_stage():
    features, labels = make_features((5, 5)), torch.arange(5)
    loss = ScaleInvariantLoss([6, 10], max_timestep=500)
    timesteps = {0: torch.tensor([0, 500, 499, 700, 20]), 1: torch.tensor([499, 3, 499, 0, 999])}
    embedded = [F.normalize(loss.heads[str(i)](features[i].mean(dim=1)), dim=-1) for i in range(2)]
    wanted = info_nce(*embedded, 0.1, counted=torch.tensor([True, False, True, False, False]))
    torch.testing.assert_close(loss(features, labels, timesteps), wanted[None])


def test_what_timestep_and_class_say_is_subtracted_and_learned():
    features, labels = make_features(), torch.tensor([0, 1, 2, 0, 1])
    loss = ScaleInvariantLoss([6, 10], subtract_condition=True, num_classes=3)
    timesteps = {0: torch.tensor([5, 9, 200, 999, 30]), 1: torch.tensor([50, 90, 400, 0, 3])}
    given = {0: torch.tensor([3, 1, 2, 0, 3]), 1: labels}  # two are dropped
    pooled = [features[i].mean(dim=1) for i in range(2)]
    guesses = [loss.guesses[str(i)](timesteps[i][: len(pooled[i])], given[i][: len(pooled[i])]) for i in range(2)]
    seen = [p - g.detach() for p, g in zip(pooled, guesses)]
    embedded = [F.normalize(loss.heads[str(i)](seen[i][:4]), dim=-1) for i in range(2)]
    contrast = info_nce(*embedded, 0.1)
    fit = sum(F.mse_loss(g, p.detach()) for p, g in zip(pooled, guesses))
    found = loss(features, labels, timesteps, given)
    torch.testing.assert_close(found, contrast[None])
    weights = [*loss.guesses.parameters()]
    for actual, wanted in zip(
        torch.autograd.grad(found.sum(), weights, retain_graph=True), torch.autograd.grad(fit, weights)
    ):
        torch.testing.assert_close(actual, wanted)
    stages = list(features.values())
    for actual, wanted in zip(torch.autograd.grad(found.sum(), stages), torch.autograd.grad(contrast, stages)):
        torch.testing.assert_close(actual, wanted)


def test_temperature_divides_the_similarities():
    torch.manual_seed(0)
    queries, keys = F.normalize(torch.randn(2, 5, 7), dim=-1)
    with torch.device("meta"):  # the tensors' device counts, not the default
        by_default = info_nce(queries, keys)
    assert by_default == info_nce(queries, keys, 0.1) == info_nce(2 * queries, keys, 0.2)
    loss = ScaleInvariantLoss([7, 7], temperature=0.5)
    features = {0: queries[:, None], 1: keys[:, None]}
    lower, higher = (F.normalize(head(features[int(i)][:, 0]), dim=-1) for i, head in loss.heads.items())
    torch.testing.assert_close(loss(features, torch.arange(5))[0], info_nce(lower, higher, 0.5))


def test_independent_embeddings_cost_about_the_logarithm_of_the_batch():
    torch.manual_seed(0)
    queries, keys = F.normalize(torch.randn(2, 256, 512), dim=-1)
    assert info_nce(queries, keys, temperature=1.0).item() == pytest.approx(math.log(256), rel=0.01)


def test_equal_embeddings_cost_nothing():
    embeddings = torch.eye(8)
    assert info_nce(embeddings, embeddings, temperature=0.05).item() < 1e-6


def test_half_precision_embeddings_are_compared_in_float32():
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(16, 32), dim=-1)
    loss = info_nce(embeddings.bfloat16(), embeddings.bfloat16(), temperature=0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(info_nce(embeddings, embeddings, 0.1).item(), abs=0.01)


def test_adjacent_stages_are_compared_on_the_images_they_share():
    torch.manual_seed(0)
    loss = ScaleInvariantLoss([16, 24, 32])
    features = {0: torch.randn(6, 4, 16), 1: torch.randn(6, 9, 24), 2: torch.randn(3, 16, 32)}
    labels = torch.arange(6)
    both = loss(features, labels)
    assert both.shape == (2,)
    # The last stage holds three of the six images: those beyond must not matter to the second pair.
    changed = features | {1: torch.cat([features[1][:3], torch.randn(3, 9, 24)])}
    torch.testing.assert_close(loss(changed, labels)[1], both[1])
    assert not torch.allclose(loss(changed, labels)[0], both[0])


def test_training_aligns_the_scales():
    torch.manual_seed(0)
    loss = ScaleInvariantLoss([8, 8])
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    image = torch.randn(16, 1, 8)
    features = {0: image + 0.1 * torch.randn(16, 5, 8), 1: image + 0.1 * torch.randn(16, 9, 8)}
    labels = torch.arange(16)
    first = loss(features, labels).item()
    for _ in range(50):
        optimizer.zero_grad()
        loss(features, labels).sum().backward()
        optimizer.step()
    assert loss(features, labels).item() < 0.1 * first


def test_only_the_chosen_pairs_are_compared():
    torch.manual_seed(0)
    features = {0: torch.randn(4, 5, 8), 1: torch.randn(4, 5, 8), 2: torch.randn(4, 5, 8)}
    chosen, every = ScaleInvariantLoss([8, 8, 8], [2]), ScaleInvariantLoss([8, 8, 8])
    assert sorted(chosen.heads) == ["1", "2"]
    chosen.load_state_dict({k: v for k, v in every.state_dict().items() if not k.startswith("heads.0")})
    labels = torch.arange(4)
    torch.testing.assert_close(chosen(features, labels), every(features, labels)[1:])


def test_alone_nothing_is_gathered():
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows) is rows


def gather_in_process(rank, folder, rows, weight):
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    # The second process's rows and gradient lie in memory column by column.
    own = (rows[rank] if rank == 0 else rows[rank].T.clone().T).requires_grad_()
    gathered = gather_rows(own)
    if rank == 0:
        (weight * gathered**2).sum().backward()
    else:
        (10 * weight.T.clone() * gathered.T).sum().backward()
    torch.save((gathered.detach(), own.grad), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_rows_of_two_processes_are_gathered_with_the_gradient_of_both_losses(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(2, 3, 2, generator=generator), torch.randn(6, 2, generator=generator)
    processes = multiprocessing.get_context("fork")
    workers = [processes.Process(target=gather_in_process, args=(rank, tmp_path, rows, weight)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    for rank in range(2):
        gathered, gradient = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(gathered, torch.cat([*rows]))
        of_own = weight[3 * rank : 3 * rank + 3]
        torch.testing.assert_close(gradient, 2 * of_own * rows[rank] + 10 * of_own)


def test_two_processes_give_the_losses_and_gradients_of_one(tmp_path):
    """Noise, batch shares and the scale-invariant loss with its negatives from the other process."""
    run_ranks(objective_in_processes.main, [str(tmp_path / "two.safetensors")])
    two, one = load_file(tmp_path / "two.safetensors"), objective_in_processes.run(0, 1)
    assert two.keys() == one.keys()
    for name, expected in one.items():
        torch.testing.assert_close(
            two[name], expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
