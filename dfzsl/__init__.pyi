from .client.build import align as align
from .client.build import build as build
from .client.evaluate import evaluate as evaluate
from .trainers.generation.classifier import Classifier as Classifier
from .trainers.generation.generate import generate as generate
from .trainers.recovery.feature_statistics import measure_feature_statistics as measure_feature_statistics
from .trainers.recovery.open_oracle import open_oracle as open_oracle
from .trainers.recovery.recover import recover as recover
from .trainers.recovery.teacher import Teacher
from .trainers.recovery.teacher import fit_teacher as fit_teacher

__version__: str
load_classifier = Classifier.load
load_teacher = Teacher.load
