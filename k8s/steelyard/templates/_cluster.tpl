{{/* The RayService's rayClusterConfig. */}}
{{- define "steelyard.cluster" -}}
{{- $root := . -}}
rayVersion: {{ (.Files.Get "files/catalog.json" | fromJson).rayVersion | quote }}
authOptions:
  mode: token
  {{- with .Values.secrets.rayTokenSecret }}
  secretName: {{ . }}
  {{- end }}
{{- with .Values.faultTolerance }}
{{- if eq .backend "redis" }}
gcsFaultToleranceOptions:
  backend: redis
  redisAddress: {{ .redis.address | quote }}
  {{- with .redis.existingSecret }}
  redisPassword:
    valueFrom:
      secretKeyRef: {name: {{ . }}, key: {{ $root.Values.faultTolerance.redis.key }}}
  {{- end }}
{{- else if eq .backend "rocksdb" }}
gcsFaultToleranceOptions:
  backend: rocksdb
  storage:
    size: {{ .rocksdb.size }}
    {{- with .rocksdb.storageClassName }}
    storageClassName: {{ . }}
    {{- end }}
{{- end }}
{{- end }}
headGroupSpec:
  rayStartParams:
    # The head decides; it carries no engine.
    num-cpus: "0"
    num-gpus: "0"
    # Nothing here scales the cluster, and the monitor's metrics would answer without a key.
    no-monitor: "true"
    object-store-memory: "{{ mul 128 1024 1024 }}"
  template:
    {{- include "steelyard.rayPod" (dict "root" $root "role" "head"
        "resources" .Values.head.resources "nodeSelector" .Values.head.nodeSelector "tolerations" .Values.head.tolerations
        "affinity" .Values.head.affinity "priorityClassName" .Values.head.priorityClassName "shmSize" "1Gi") | nindent 4 }}
workerGroupSpecs:
  {{- range $group := .Values.workers }}
  {{- $known := default dict (get $root.Values.accelerators (default "" $group.accelerator)) }}
  {{- $resources := deepCopy (default $root.Values.workerDefaults.resources $group.resources) }}
  {{- if $group.gpus }}
  {{- $_ := set $resources "limits" (set (default dict $resources.limits) "nvidia.com/gpu" (int $group.gpus)) }}
  {{- $_ := set $resources "requests" (set (default dict $resources.requests) "nvidia.com/gpu" (int $group.gpus)) }}
  {{- end }}
  - groupName: {{ $group.name }}
    replicas: {{ int $group.replicas }}
    minReplicas: {{ int $group.replicas }}
    maxReplicas: {{ int $group.replicas }}
    {{- with $group.labels }}
    labels:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    rayStartParams:
      # As on bare metal: engines of a pod share its cores, GPUs are what is scarce.
      num-cpus: "1024"
      object-store-memory: "{{ mul 128 1024 1024 }}"
    template:
      {{- include "steelyard.rayPod" (dict "root" $root "role" "worker" "resources" $resources
          "nodeSelector" (merge (dict) (default dict $group.nodeSelector) (default dict $known.nodeSelector))
          "tolerations" (concat (default list $known.tolerations) (default list $group.tolerations))
          "affinity" $group.affinity
          "priorityClassName" (default $root.Values.workerDefaults.priorityClassName $group.priorityClassName)
          "runtimeClassName" (ternary $root.Values.workerDefaults.runtimeClassName "" (gt (int (default 0 $group.gpus)) 0))
          "shmSize" (default $root.Values.workerDefaults.shmSize $group.shmSize)) | nindent 6 }}
  {{- end }}
{{- end -}}

{{/*
Twelve hex digits over everything that makes KubeRay build a new cluster, of the first `groups` worker groups: KubeRay
hashes rayClusterConfig without replicas, tolerations and groups added at the end
(GenerateHashWithoutReplicasAndWorkersToDelete and isClusterSpecHashEqual of its RayService controller).
*/}}
{{- define "steelyard.shape" -}}
{{- $cluster := include "steelyard.cluster" .root | fromYaml -}}
{{- $_ := unset $cluster.headGroupSpec.template.spec "tolerations" -}}
{{- $groups := list -}}
{{- range $index, $group := $cluster.workerGroupSpecs -}}
{{- if lt $index (int $.groups) -}}
{{- $_ := unset $group.template.spec "tolerations" -}}
{{- $groups = append $groups (omit $group "replicas" "minReplicas" "maxReplicas") -}}
{{- end -}}
{{- end -}}
{{- set $cluster "workerGroupSpecs" $groups | toJson | sha256sum | trunc 12 -}}
{{- end -}}

{{/* Fails when an upgrade would change the running cluster's shape unasked. Prints nothing. */}}
{{- define "steelyard.acknowledged" -}}
{{- $name := include "steelyard.fullname" . -}}
{{- $count := len .Values.workers -}}
{{- $shape := include "steelyard.shape" (dict "root" . "groups" $count) -}}
{{- $accepted := .Values.upgrade.acknowledgedShape -}}
{{- if and $accepted (ne $accepted $shape) -}}
{{- fail (printf "the values make a cluster of shape %s and upgrade.acknowledgedShape is %s: look at what changed, then set it to %s" $shape $accepted $shape) -}}
{{- end -}}
{{- $running := lookup "ray.io/v1" "RayService" .Release.Namespace $name -}}
{{- if and $running (not $accepted) -}}
{{- $notes := default dict $running.metadata.annotations -}}
{{- $had := int (default "0" (get $notes "steelyard/worker-groups")) -}}
{{- $same := false -}}
{{- if and (gt $had 0) (ge $count $had) -}}
{{- $same = eq (include "steelyard.shape" (dict "root" . "groups" $had)) (get $notes "steelyard/cluster-shape") -}}
{{- end -}}
{{- if not $same -}}
{{- $gpus := 0 -}}
{{- range .Values.workers -}}{{- $gpus = add $gpus (mul (int .replicas) (int (default 0 .gpus))) -}}{{- end -}}
{{- if eq .Values.upgrade.strategy "NewCluster" -}}
{{- fail (printf "this change makes KubeRay build a second cluster beside the running one, which needs %d more GPUs until it takes over; to go on: --set-string upgrade.acknowledgedShape=%s (or upgrade.strategy=None and a moment without service)" $gpus $shape) -}}
{{- else -}}
{{- fail (printf "this change does not reach the running cluster while upgrade.strategy is None; to go on: --set-string upgrade.acknowledgedShape=%s, then delete the RayCluster of %s, which stops its engines and starts new ones" $shape $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
