{{/* Pods of this release that run Ray: (dict "root" $ ). */}}
{{- define "steelyard.peers" -}}
- podSelector:
    matchLabels:
      {{- include "steelyard.selector" . | nindent 6 }}
    matchExpressions:
      - {key: app.kubernetes.io/component, operator: In, values: [head, worker]}
{{- end -}}

{{- define "steelyard.clients" -}}
- ports: [{port: 8000, protocol: TCP}]
  {{- if .Values.networkPolicy.clients }}
  from:
    {{- toYaml .Values.networkPolicy.clients | nindent 4 }}
    - podSelector:
        matchLabels:
          {{- include "steelyard.selector" . | nindent 10 }}
          app.kubernetes.io/component: test
  {{- end }}
{{- if and .Values.monitoring.enabled .Values.networkPolicy.clients }}
- ports: [{port: 8000, protocol: TCP}]
  from:
    {{- toYaml .Values.networkPolicy.prometheus | nindent 4 }}
{{- end }}
{{- end -}}

{{- define "steelyard.egress" -}}
- to:
    {{- include "steelyard.peers" . | nindent 4 }}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
{{- with .Values.networkPolicy.egress.allow }}
{{ toYaml . }}
{{- end }}
{{- end -}}
