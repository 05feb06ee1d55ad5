{{/*
The pod, written once: (dict "root" $ "role" "head|worker|test" ...). Every pod of the chart passes the restricted Pod
Security Standard; KubeRay's own init container copies security context, environment and mounts of the Ray container.
*/}}
{{- define "steelyard.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "steelyard.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "steelyard.podCommon" -}}
serviceAccountName: {{ include "steelyard.serviceAccount" . }}
automountServiceAccountToken: false
# A Service called steelyard would put STEELYARD_PORT=tcp://... into every pod.
enableServiceLinks: false
securityContext:
  {{- include "steelyard.podSecurity" . | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "steelyard.env" -}}
- {name: STEELYARD_STATE_DIR, value: /var/lib/steelyard}
- {name: STEELYARD_CACHE_DIR, value: {{ (.Files.Get "files/catalog.json" | fromJson).cacheDir }}}
- {name: STEELYARD_RUNTIME_DIR, value: /run/steelyard}
- {name: STEELYARD_CLUSTER_SECRET_FILE, value: /etc/steelyard/secrets/cluster-secret}
- {name: STEELYARD_API_KEYS_FILE, value: /etc/steelyard/secrets/keys.json}
- {name: STEELYARD_PROFILE, value: {{ .Values.profile }}}
- {name: STEELYARD_HOST, value: "0.0.0.0"}
- {name: STEELYARD_PORT, value: "8000"}
- {name: STEELYARD_RAY_ADDRESS, value: auto}
# `up` and `down` refuse: the RayService is the only writer of the Serve config.
- {name: STEELYARD_MANAGED_BY, value: rayservice}
{{- with .Values.tracing }}
{{- if .endpoint }}
- {name: STEELYARD_OTLP_ENDPOINT, value: {{ .endpoint | quote }}}
- {name: STEELYARD_TRACE_RATIO, value: {{ .ratio | quote }}}
- {name: STEELYARD_TRACE_SERVICE, value: {{ .serviceName | quote }}}
{{- if .existingSecret }}
- {name: STEELYARD_OTLP_HEADERS_FILE, value: /etc/steelyard/tracing/headers}
{{- end }}
{{- end }}
{{- end }}
- {name: HOME, value: /home/steelyard}
# Weights come from a folder; nothing is looked up on a hub.
- {name: HF_HUB_OFFLINE, value: "1"}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
# Ray's exporters would answer without a key. The dashboard's has no switch: a port that cannot be opened is one.
- {name: RAY_enable_metrics_collection, value: "0"}
- {name: RAY_SERVE_METRICS_EXPORT_INTERVAL_MS, value: "60000"}
# Starts that may fail: a replica itself waits longer after each.
- {name: RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT, value: "1000000"}
- {name: RAY_event_stats, value: "0"}
# Else each of these two's fifty threads hoards what it frees.
- {name: RAY_JEMALLOC_PROFILE, value: "raylet,gcs_server"}
- {name: RAY_JEMALLOC_CONF, value: "narenas:1,tcache:false"}
# What a replica imports, so that the process that waits for the next one has it.
- {name: RAY_preload_python_modules, value: {{ (.Files.Get "files/catalog.json" | fromJson).preload | quote }}}
# Not Ray's 15: gateways and engines are what the machine is for.
- {name: RAY_worker_niceness, value: "0"}
- {name: DASHBOARD_METRIC_PORT, value: "65536"}
- {name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO, value: "0"}
{{- end -}}

{{/* Names the chart sets above and those KubeRay adds: a second entry would win or lose by its place in the list. */}}
{{- define "steelyard.extraEnv" -}}
{{- $taken := list -}}
{{- range (include "steelyard.env" .root | fromYamlArray) -}}{{- $taken = append $taken .name -}}{{- end -}}
{{- range .root.Values.extraEnv -}}
{{- if or (has .name $taken) (hasPrefix "STEELYARD_" .name) (hasPrefix "RAY_AUTH_" .name) (has .name (list "RAY_ADDRESS" "RAY_PORT" "RAY_IP" "FQ_RAY_IP" "RAY_CLUSTER_NAME" "RAY_REDIS_ADDRESS" "REDIS_PASSWORD" "REDIS_USERNAME" "PYTHONPATH" "LD_PRELOAD")) -}}
{{- fail (printf "extraEnv: %s is set by the chart or by KubeRay, or given twice; use the value that is meant for it" .name) -}}
{{- end -}}
{{- $taken = append $taken .name }}
- {name: {{ .name }}, value: {{ .value | quote }}}
{{- end -}}
{{- end -}}

{{- define "steelyard.rayPod" -}}
{{- $root := .root -}}
{{- $head := eq .role "head" -}}
{{- $store := $root.Values.weights.objectStore -}}
{{- $tracing := $root.Values.tracing -}}
metadata:
  labels:
    {{- include "steelyard.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
  {{- with $root.Values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "steelyard.podCommon" $root | nindent 2 }}
  # The drain, and beyond it what Ray and the engines take to end.
  terminationGracePeriodSeconds: {{ add (int $root.Values.drainSeconds) 30 }}
  {{- with .priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if and (not $head) $root.Values.topologySpread }}
  topologySpreadConstraints:
    {{- range $root.Values.topologySpread }}
    - {{ omit . "labelSelector" | toYaml | nindent 6 | trim }}
      labelSelector:
        matchLabels:
          {{- include "steelyard.selector" $root | nindent 10 }}
          app.kubernetes.io/component: worker
    {{- end }}
  {{- end }}
  {{- if and (not $head) $store.enabled }}
  initContainers:
    - name: fetch-weights
      image: {{ $store.image }}
      # Copies what is missing, never changes or deletes: several pods may share the cache. A replaced object is an error.
      args: [copy, {{ $store.source | quote }}, {{ $root.Values.weights.mountPath }}, --immutable, --transfers=8, --multi-thread-streams=8, --stats=30s, --stats-one-line]
      env:
        - {name: RCLONE_CONFIG, value: /tmp/rclone.conf}
        - {name: HOME, value: /tmp}
      envFrom:
        - secretRef: {name: {{ $store.secretName }}}
      securityContext:
        {{- include "steelyard.containerSecurity" $root | nindent 8 }}
      resources:
        requests: {cpu: "1", memory: 1Gi}
        limits: {memory: 4Gi}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: weights, mountPath: {{ $root.Values.weights.mountPath }}}
  {{- end }}
  containers:
    - name: ray-{{ .role }}
      image: {{ include "steelyard.image" $root | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      env:
        {{- include "steelyard.env" $root | nindent 8 }}
        {{- with include "steelyard.extraEnv" . | trim }}
        {{- . | nindent 8 }}
        {{- end }}
      ports:
        {{- if $head }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        {{- end }}
        - {name: serve, containerPort: 8000}
      resources:
        {{- toYaml .resources | nindent 8 }}
      securityContext:
        {{- include "steelyard.containerSecurity" $root | nindent 8 }}
      # Ray's agent on the node answers these without the token; nothing else of it does.
      startupProbe:
        httpGet: {path: /api/healthz, port: 52365}
        periodSeconds: 5
        failureThreshold: 60
        timeoutSeconds: 5
      livenessProbe:
        httpGet: {path: /api/healthz, port: 52365}
        periodSeconds: 5
        failureThreshold: 24
        timeoutSeconds: 5
      readinessProbe:
        {{- if $head }}
        httpGet: {path: /api/healthz, port: 52365}
        {{- else }}
        httpGet: {path: /-/healthz, port: serve}
        {{- end }}
        periodSeconds: 5
        failureThreshold: 2
        timeoutSeconds: 5
      {{- if or (not $head) $root.Values.head.servesTraffic }}
      lifecycle:
        preStop:
          # What this pod has in progress ends, the rest goes elsewhere. The Service hears of it no sooner than this command.
          exec: {command: [steelyard, node, drain, --within, {{ $root.Values.drainSeconds | int | quote }}, --accept-for, "5"]}
      {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/steelyard}
        - {name: state, mountPath: /var/lib/steelyard}
        - {name: run, mountPath: /run/steelyard}
        - {name: shm, mountPath: /dev/shm}
        - {name: secrets, mountPath: /etc/steelyard/secrets, readOnly: true}
        {{- if and $tracing.endpoint $tracing.existingSecret }}
        - {name: tracing, mountPath: /etc/steelyard/tracing, readOnly: true}
        {{- end }}
        {{- if and (not $head) (or $root.Values.weights.existingClaim $store.enabled) }}
        - name: weights
          mountPath: {{ $root.Values.weights.mountPath }}
          readOnly: true
          {{- if and $root.Values.weights.existingClaim $root.Values.weights.subPath }}
          subPath: {{ $root.Values.weights.subPath }}
          {{- end }}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: home, emptyDir: {}}
    - {name: state, emptyDir: {}}
    - {name: run, emptyDir: {medium: Memory, sizeLimit: 16Mi}}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ .shmSize }}}}
    - name: secrets
      secret:
        secretName: {{ include "steelyard.secret" $root }}
        defaultMode: 0400
        items:
          - {key: cluster-secret, path: cluster-secret}
          - {key: keys.json, path: keys.json}
    {{- if and $tracing.endpoint $tracing.existingSecret }}
    - name: tracing
      secret:
        secretName: {{ $tracing.existingSecret }}
        defaultMode: 0400
        items:
          - {key: {{ $tracing.key }}, path: headers}
    {{- end }}
    {{- if not $head }}
    {{- if $root.Values.weights.existingClaim }}
    - name: weights
      persistentVolumeClaim: {claimName: {{ $root.Values.weights.existingClaim }}, readOnly: true}
    {{- else if $store.enabled }}
    - name: weights
      {{- if $store.existingClaim }}
      persistentVolumeClaim: {claimName: {{ $store.existingClaim }}}
      {{- else if $store.storageClassName }}
      ephemeral:
        volumeClaimTemplate:
          spec:
            accessModes: [ReadWriteOnce]
            storageClassName: {{ $store.storageClassName }}
            resources: {requests: {storage: {{ $store.size }}}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $store.size }}}
      {{- end }}
    {{- end }}
    {{- end }}
{{- end -}}
