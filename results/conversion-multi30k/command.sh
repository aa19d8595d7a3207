# train.jsonl, validation.jsonl and test.jsonl: Multi30k's pairs as {"de": ..., "en": ...}, 29,000,
# 1,014 and 1,000 (2016) of them. Three seeds, 840 stages, in two parts (the stage cache): commits
# 9d084cd, 4c08caa. Predictions, replicates and learning_curve records are left out of results.jsonl.
python launch.py --config=configs/sweeps/conversion.py --jobs=2 --config.name=multi30k \
    --config.pretrain.task=files --config.finetune.tasks=files \
    --config.files.train=train.jsonl --config.files.validation=validation.jsonl \
    --config.files.test=test.jsonl --config.files.source=de --config.files.target=en \
    --config.files.metrics=bleu --config.pretrain.steps=2500 --config.pretrain.every=500 \
    --config.pretrain.batch_size=32 --config.pretrain.num_microbatches=2 \
    --config.pretrain.inputs_length=32 --config.pretrain.targets_length=32 \
    --config.pretrain.validation_examples=1014 --config.finetune.batch_size=32 \
    --config.finetune.num_microbatches=2 --config.finetune.pack=False \
    --config.finetune.inputs_length=32 --config.finetune.targets_length=32 \
    --config.finetune.steps=200 --config.finetune.learning_rate=0.003 \
    --config.evaluate.examples=0 --config.sweep.scores.tasks=files --config.sweep.figure4.tasks=files
