{{/* Values that would install and then not work, each refused with a sentence. Prints nothing. */}}
{{- define "steelyard.checks" -}}
{{- $values := .Values -}}
{{- if not .Values.workers -}}{{- fail "workers is empty: engines run on workers; give at least one group" -}}{{- end -}}
{{- $groups := list -}}
{{- $offered := dict -}}
{{- $largest := dict -}}
{{- $pods := 0 -}}
{{- range $group := .Values.workers -}}
{{- if has $group.name $groups -}}{{- fail (printf "workers: the group %q is there twice" $group.name) -}}{{- end -}}
{{- $groups = append $groups $group.name -}}
{{- $gpus := int (default 0 $group.gpus) -}}
{{- $kind := default "" $group.accelerator -}}
{{- if and $kind (not (hasKey $values.accelerators $kind)) -}}
{{- fail (printf "workers: group %s: the accelerator %q is not in accelerators (there are: %s); add where it is found" $group.name $kind (keys $values.accelerators | sortAlpha | join ", ")) -}}
{{- end -}}
{{- if and $kind (not $gpus) -}}{{- fail (printf "workers: group %s: it has an accelerator and no gpus: say how many a pod gets" $group.name) -}}{{- end -}}
{{- if and $gpus (ne $values.profile "gpu") -}}{{- fail (printf "workers: group %s: it takes GPUs and profile is %s, which uses none" $group.name $values.profile) -}}{{- end -}}
{{- $pods = add $pods (int $group.replicas) -}}
{{- range $key := uniq (list $kind "") -}}
{{- $_ := set $offered $key (add (default 0 (get $offered $key)) (mul $gpus (int $group.replicas))) -}}
{{- if gt (int $group.replicas) 0 -}}{{- $_ := set $largest $key (max (default 0 (get $largest $key)) $gpus) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if not $pods -}}{{- fail "workers: every group has 0 replicas: no engine could run" -}}{{- end -}}
{{- $wanted := dict -}}
{{- range $model := (include "steelyard.catalog" . | fromJson).models -}}
{{- range $version := $model.versions -}}
{{- $id := printf "%s@%s" $model.name $version.version -}}
{{- $gpus := float64 (default 0 $version.resources.gpus) -}}
{{- $kind := default "" $version.resources.accelerator -}}
{{- if and $kind (not (hasKey $offered $kind)) -}}{{- fail (printf "models: %s wants the accelerator %s and no worker group has it" $id $kind) -}}{{- end -}}
{{- if gt $gpus (float64 (default 0 (get $largest $kind))) -}}
{{- fail (printf "models: %s wants %v GPUs in one pod and the largest %sworker has %d" $id $gpus (ternary (printf "%s " $kind) "" (ne $kind "")) (int (default 0 (get $largest $kind)))) -}}
{{- end -}}
{{- $most := mulf $gpus $version.scaling.max -}}
{{- if gt $most (float64 (default 0 (get $offered $kind))) -}}
{{- fail (printf "models: %s: scaling.max is %d, which wants %v %sGPUs, and the workers have %d: raise replicas of a group, or lower scaling.max" $id (int $version.scaling.max) $most (ternary (printf "%s " $kind) "" (ne $kind "")) (int (default 0 (get $offered $kind)))) -}}
{{- end -}}
{{- $need := mulf $gpus $version.scaling.min -}}
{{- range $key := uniq (list $kind "") -}}{{- $_ := set $wanted $key (addf (default 0 (get $wanted $key)) $need) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- range $kind := append (without (keys $wanted | sortAlpha) "") "" -}}
{{- $need := default 0 (get $wanted $kind) -}}
{{- if gt (float64 $need) (float64 (default 0 (get $offered $kind))) -}}
{{- fail (printf "models want %v %sGPUs and the workers have %d: raise replicas of a group, or lower scaling" $need (ternary (printf "%s " $kind) "" (ne $kind "")) (int (default 0 (get $offered $kind)))) -}}
{{- end -}}
{{- end -}}
{{- $store := .Values.weights.objectStore -}}
{{- if $store.enabled -}}
{{- if .Values.weights.existingClaim -}}{{- fail "weights: existingClaim and objectStore.enabled exclude each other" -}}{{- end -}}
{{- if not $store.source -}}{{- fail "weights.objectStore.source is empty: say what to copy, e.g. store:bucket/prefix" -}}{{- end -}}
{{- if not $store.secretName -}}{{- fail "weights.objectStore.secretName is empty: name the Secret that defines the store (RCLONE_CONFIG_STORE_TYPE and so on)" -}}{{- end -}}
{{- if and .Values.networkPolicy.enabled .Values.networkPolicy.egress.enabled (not .Values.networkPolicy.egress.allow) -}}
{{- fail "weights.objectStore is on and networkPolicy.egress.allow is empty: pods could not reach the store; allow it" -}}
{{- end -}}
{{- end -}}
{{- $ft := .Values.faultTolerance -}}
{{- if eq $ft.backend "redis" -}}
{{- if not $ft.redis.address -}}{{- fail "faultTolerance.redis.address is empty: give host:port" -}}{{- end -}}
{{- if and .Values.networkPolicy.enabled .Values.networkPolicy.egress.enabled (not .Values.networkPolicy.egress.allow) -}}
{{- fail "faultTolerance.backend is redis and networkPolicy.egress.allow is empty: the head could not reach it; allow it" -}}
{{- end -}}
{{- end -}}
{{- if .Values.tracing.endpoint -}}
{{- if and .Values.networkPolicy.enabled .Values.networkPolicy.egress.enabled (not .Values.networkPolicy.egress.allow) -}}
{{- fail "tracing.endpoint is set and networkPolicy.egress.allow is empty: pods could not reach the collector; allow it" -}}
{{- end -}}
{{- else if .Values.tracing.existingSecret -}}{{- fail "tracing.existingSecret is set and tracing.endpoint is not: say where the traces go" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}{{- fail "ingress.hosts is empty: name at least one host" -}}{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}{{- fail "httpRoute.parentRefs is empty: name the Gateway it attaches to" -}}{{- end -}}
{{- if .Values.monitoring.enabled -}}{{- include "steelyard.monitoringChecks" . -}}
{{- else if .Values.monitoring.rules -}}{{- fail "monitoring.rules is on and monitoring.enabled is not: alerts over series that nobody scrapes would say that all is down" -}}{{- end -}}
{{- if .Values.test.model -}}
{{- $names := list -}}
{{- range .Values.models -}}{{- $names = append $names .name -}}{{- end -}}
{{- if not (has .Values.test.model $names) -}}{{- fail (printf "test.model is %q, which is no model (there are: %s)" .Values.test.model (join ", " $names)) -}}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "steelyard.monitoringChecks" -}}
{{- $given := .Values.monitoring -}}
{{- $seconds := mul (regexFind "^[0-9]+" $given.interval | int) (ternary 60 1 (hasSuffix "m" $given.interval)) -}}
{{- if lt $seconds 5 -}}{{- fail (printf "monitoring.interval is %s: a scrape takes time of each engine's event loop; use at least 5s" $given.interval) -}}{{- end -}}
{{- if gt $seconds 120 -}}
{{- fail (printf "monitoring.interval is %s: Prometheus forgets a series 5 minutes after its last sample, so one lost scrape must not make a gap; use at most 2m" $given.interval) -}}
{{- end -}}
{{- range $label, $_ := include "steelyard.labels" . | fromYaml -}}
{{- if hasKey $given.labels $label -}}{{- fail (printf "monitoring.labels: %s is set by the chart" $label) -}}{{- end -}}
{{- end -}}
{{- if and (not $given.existingSecret) (has $given.key (list "cluster-secret" "keys.json" "api-key")) -}}
{{- fail (printf "monitoring.key is %s, which opens more than metrics: name an entry with a key of the scope metrics alone" $given.key) -}}
{{- end -}}
{{- if and $given.existingSecret (eq $given.existingSecret (include "steelyard.secret" .)) -}}
{{- fail (printf "monitoring.existingSecret is %s, the release's own Secret, which is used without it: leave it empty" $given.existingSecret) -}}
{{- end -}}
{{- end -}}
