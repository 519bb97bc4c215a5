from genscale.api import config as config
from genscale.api import load as load
from genscale.api import train as train
from genscale.cli import start as start
from genscale.data.lanes import Data as Data
from genscale.data.loader_settings import LoaderSettings as LoaderSettings
from genscale.data.map_data import MapData as MapData
from genscale.data.row_source import RowSource as RowSource
from genscale.data.shard_data import ShardData as ShardData
from genscale.errors import UserError as UserError
from genscale.evaluation.trained_run import TrainedRun as TrainedRun
from genscale.families import register as register
from genscale.families.entry import Family as Family
from genscale.families.entry import Sampling as Sampling
from genscale.families.entry import Scoring as Scoring
from genscale.families.own import SimpleObjective as SimpleObjective
from genscale.families.own import make_family as make_family
from genscale.hook import Hook as Hook
from genscale.hook import Order as Order
from genscale.hook import StepReport as StepReport
from genscale.hook import every as every
from genscale.models.moving_state import MovingState as MovingState
from genscale.objectives.base import Objective as Objective
from genscale.objectives.base import Phase as Phase
from genscale.settings.config import Config as Config
from genscale.training.run import RunResult as RunResult

__version__: str
