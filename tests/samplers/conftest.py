"""The network that the samplers' tests share."""

import pytest
import torch


class Network(torch.nn.Module):
    """A small random network whose output varies with the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(16, 2, 3, padding=1)
        )

    @torch.no_grad()
    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, condition: dict | None = None) -> torch.Tensor:
        time = (timesteps.float() / 1000).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.layers(torch.cat([x, time], dim=1))


@pytest.fixture
def network() -> Network:
    torch.manual_seed(1)
    return Network()
