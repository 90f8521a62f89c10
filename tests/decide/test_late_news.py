"""Letters arrive in order, once, and as they were when sent."""

from __future__ import annotations

import torch

from mogeo.decide.late_news import Mailbox


def test_letters_arrive_in_order_and_once() -> None:
    mailbox = Mailbox()
    numbers = torch.tensor([1, 2])
    mailbox.post([numbers], "first")
    numbers += 10  # what was sent does not change on its way
    mailbox.post([numbers, torch.tensor([True])], "second")
    assert list(mailbox.arrived()) == [([[1, 2]], "first"), ([[11, 12], [True]], "second")]
    assert list(mailbox.arrived()) == []
