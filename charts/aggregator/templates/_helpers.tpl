{{/* What a chart is: labels, names, and the parts that both processes share. A part is (dict "root" $ "part" "receiver"). */}}

{{- define "aggregator.selector" -}}
app.kubernetes.io/name: datavector-{{ .part }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end -}}

{{- define "aggregator.labels" -}}
{{ include "aggregator.selector" . }}
app.kubernetes.io/part-of: datavector
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end -}}

{{/* Both processes: what the Service of metrics selects. */}}
{{- define "aggregator.measured" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
datavector.dev/metrics: "true"
{{- end -}}

{{- define "aggregator.storeClaim" -}}
{{ .Values.store.existingClaim | default (printf "%s-store" .Release.Name) }}
{{- end -}}

{{- define "aggregator.tlsSecret" -}}
{{ .Values.tls.secret | default (printf "%s-tls" .Release.Name) }}
{{- end -}}

{{- define "aggregator.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "aggregator.jobImage" -}}
{{ .Values.jobImage.repository }}:{{ .Values.jobImage.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* Names of the Service inside the cluster, as a JSON list. */}}
{{- define "aggregator.serviceNames" -}}
{{- $short := printf "%s-receiver" .Release.Name -}}
{{- $full := printf "%s.%s.svc" $short .Release.Namespace -}}
{{- list $full $short (printf "%s.%s" $short .Release.Namespace) (printf "%s.cluster.local" $full) | toJson -}}
{{- end -}}

{{/* A value as text. Helm reads numbers of a file as floats, and would write 1000000 as 1e+06. */}}
{{- define "aggregator.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end -}}

{{- define "aggregator.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "aggregator.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "aggregator.podMetadata" -}}
{{- $values := get .root.Values .part -}}
labels:
  {{- include "aggregator.selector" . | nindent 2 }}
  app.kubernetes.io/part-of: datavector
  app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
  datavector.dev/metrics: "true"
  {{- with $values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* A process's Pod but its container and volumes of its own: restricted Pod Security, with a token of the API. */}}
{{- define "aggregator.pod" -}}
{{- $values := get .root.Values .part -}}
serviceAccountName: {{ .root.Release.Name }}-{{ .part }}
automountServiceAccountToken: true
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
securityContext:
  {{- include "aggregator.podSecurity" . | nindent 2 }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The node of the other process: a volume of one node (ReadWriteOnce) must be where both are. */}}
{{- define "aggregator.beside" -}}
topologyKey: kubernetes.io/hostname
labelSelector:
  matchLabels:
    {{- include "aggregator.selector" . | nindent 4 }}
{{- end -}}
