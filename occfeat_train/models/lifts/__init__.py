"""How image features become BEV features, each way in one file; ``base`` says what a lift is."""

from occfeat_targets.store.registry import Registry

LIFTS = Registry(
    "lift",
    {
        "simplebev": "occfeat_train.models.lifts.simplebev:SimpleBEVLift",
        "bevformer": "occfeat_train.models.lifts.bevformer:BEVFormerLift",
        "tpv": "occfeat_train.models.lifts.tpv:TpvLift",
    },
)
