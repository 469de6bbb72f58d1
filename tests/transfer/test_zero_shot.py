import torch
from torch.nn import functional as F

from m3i_scale.transfer.zero_shot import label_scores, nearest_captions


def test_a_label_scores_as_its_nearest_caption():
    torch.manual_seed(0)
    images, captions = (F.normalize(torch.randn(n, 7), dim=1) for n in (5, 9))
    label = torch.tensor([2, 0, 0, 1, 2, 2, 0, 4, 1])  # no caption of label 3
    wanted = torch.full((5, 5), -torch.inf)
    for n in range(5):
        for m in range(9):
            wanted[n, label[m]] = max(wanted[n, label[m]], images[n] @ captions[m])
    for chunk in (1, 2, 100):
        torch.testing.assert_close(label_scores(images, captions, label, 5, chunk), wanted)


def test_the_best_label_is_that_of_the_nearest_caption():
    torch.manual_seed(0)
    images, captions = (F.normalize(torch.randn(n, 7), dim=1) for n in (20, 30))
    label = torch.randint(0, 6, (30,))
    cosine, index = nearest_captions(images, captions, 3)
    assert (cosine[:, :-1] >= cosine[:, 1:]).all()
    assert torch.equal(label_scores(images, captions, label, 6).argmax(1), label[index[:, 0]])


def test_fewer_captions_than_asked_for():
    cosine, index = nearest_captions(torch.eye(3)[:2], torch.eye(3), 10)
    assert cosine.shape == index.shape == (2, 3)
