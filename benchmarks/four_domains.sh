#!/usr/bin/env bash
# Four real domains on the EfficientNet-Lite0 backbone, by the command line alone.
# Expected: every adapted accuracy above its linear probe; about an hour on one busy core.
#   bash benchmarks/four_domains.sh BANK      (ONETRUNK_DATA: the folder of Parquet domains)
set -euo pipefail
bank="${1:?give a folder for the bank}"
export OMP_NUM_THREADS=1
onetrunk new "$bank" --backbone timm:tf_efficientnet_lite0
for domain in flowers:20 satellite:22 sketch:23 gtsrb:15; do
  onetrunk train "$bank" "${domain%%:*}" --data "$ONETRUNK_DATA/${domain%%:*}" --epochs "${domain##*:}"
done
onetrunk verify "$bank"
