import torch
from torch.nn import functional as F

from m3i_scale.transfer.linear_probe import fit


def blobs(count, seed):
    """Three classes that a line through the origin of the raw features cannot tell apart."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 3
    centres = torch.tensor([[100.0, 0.001], [101.0, 0.002], [102.0, 0.001]])
    noise = torch.randn(count, 2, generator=generator) * torch.tensor([0.1, 0.0001])
    return centres[label] + noise, label


def test_it_separates_what_a_line_separates_at_any_scale():
    gallery, label = blobs(60, seed=0)
    queries, truth = blobs(30, seed=1)
    scores = fit(gallery, label, 3, iterations=50)(queries)
    assert torch.equal(scores.argmax(1), truth)


def test_it_is_the_minimum_of_its_loss():
    torch.manual_seed(0)
    gallery, label = torch.randn(40, 4, dtype=torch.float32), torch.randint(0, 3, (40,))
    scores = fit(gallery, label, 3, penalty=0.1, iterations=200)(gallery)
    x = (gallery - gallery.mean(0)) / gallery.std(0)
    design = torch.cat([x, torch.ones(40, 1)], dim=1)
    solution = torch.linalg.lstsq(design, scores).solution  # (5, 3): weights and bias
    parameters = solution.double().requires_grad_()
    loss = F.cross_entropy(design.double() @ parameters, label)
    loss = loss + 0.05 * parameters[:4].square().sum()
    (gradient,) = torch.autograd.grad(loss, parameters)
    assert gradient.abs().max() < 1e-3


def test_it_depends_on_no_seed():
    gallery, label = blobs(30, seed=0)
    torch.manual_seed(1)
    first = fit(gallery, label, 3)(gallery)
    torch.manual_seed(2)
    assert torch.equal(first, fit(gallery, label, 3)(gallery))
