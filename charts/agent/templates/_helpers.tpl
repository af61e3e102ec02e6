{{/* What a chart is: labels, names, and the parts that all modes share. */}}

{{- define "agent.selector" -}}
app.kubernetes.io/name: datavector-agent
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "agent.labels" -}}
{{ include "agent.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "agent.stateClaim" -}}
{{ .Values.state.existingClaim | default (printf "%s-state" .Release.Name) }}
{{- end -}}

{{/* A PersistentVolume's source cannot change, so another folder is another volume, of another name. */}}
{{- define "agent.dataVolume" -}}
{{ .Release.Name }}-data-{{ printf "%s %s %s" .Values.data.hostPath .Values.data.nfs.server .Values.data.nfs.path | sha256sum | trunc 8 }}
{{- end -}}

{{- define "agent.dataClaim" -}}
{{ .Values.data.existingClaim | default (include "agent.dataVolume" .) }}
{{- end -}}

{{- define "agent.tlsSecret" -}}
{{ .Values.tls.secret | default (printf "%s-tls" .Release.Name) }}
{{- end -}}

{{- define "agent.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* A value as text. Helm reads numbers of a file as floats, and would write 1000000 as 1e+06. */}}
{{- define "agent.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end -}}

{{- define "agent.proxySettings" -}}
{{- with .Values.proxy }}
{{- if .existingSecret }}
- name: https_proxy
  valueFrom: {secretKeyRef: {name: {{ .existingSecret }}, key: https_proxy}}
{{- else if .https }}
- name: https_proxy
  value: {{ .https | quote }}
{{- end }}
{{- if .noProxy }}
- name: no_proxy
  value: {{ .noProxy | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The environment: the settings of docs/agent.md, by the names of the values. */}}
{{- define "agent.env" -}}
{{- $root := .root -}}
{{- with $root.Values -}}
- name: HOME
  value: /tmp
{{- if or $.device (not (int .gpu.count)) }}
- name: NVIDIA_VISIBLE_DEVICES  # the image says all, and a node's default runtime would obey
  value: void
{{- end }}
- name: DATAVECTOR_AGENT_AGGREGATOR
  value: {{ .aggregator | quote }}
{{- range $name := list "hospital" "policy" "base" }}
{{- with get $root.Values $name }}
- name: DATAVECTOR_AGENT_{{ upper $name }}
  value: {{ . | quote }}
{{- end }}
{{- end }}
- name: DATAVECTOR_AGENT_STATE
  value: /state
- name: DATAVECTOR_AGENT_METRICS_PORT
  value: "9090"
- name: DATAVECTOR_AGENT_TLS__CERTIFICATE
  value: /tls/tls.crt
- name: DATAVECTOR_AGENT_TLS__KEY
  value: /tls/tls.key
- name: DATAVECTOR_AGENT_TLS__CA
  value: /tls/ca.crt
- name: DATAVECTOR_AGENT_DATA__PATH
  value: {{ printf "/data/%s" .data.path | trimSuffix "/" | quote }}
- name: DATAVECTOR_AGENT_DATA__VALIDATION
  value: {{ include "agent.text" .data.validation | quote }}
- name: DATAVECTOR_AGENT_DATA__MAX_CORRUPT
  value: {{ include "agent.text" .data.maxCorrupt | quote }}
{{- range $group := list "training" "tasks" }}
{{- range $key, $value := get $root.Values $group }}
{{- $value = ternary $.device $value (and (eq $key "device") (hasKey $ "device")) }}
- name: DATAVECTOR_AGENT_{{ upper $group }}__{{ $key | snakecase | upper }}
  value: {{ include "agent.text" $value | quote }}
{{- end }}
{{- end }}
{{- include "agent.proxySettings" $root }}
{{- with .extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "agent.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if gt (int .Values.gpu.count) 0 -}}
{{- $gpus := dict .Values.gpu.resource (int .Values.gpu.count) -}}
{{- $_ := set $resources "limits" (merge $gpus ($resources.limits | default dict)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* One container: (dict "root" $ "name" ... "args" (list ...)), and "device" where it is not that of the values. */}}
{{- define "agent.container" -}}
{{- $root := .root -}}
- name: {{ .name }}
  image: {{ include "agent.image" $root }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  args: {{ toJson .args }}
  env:
    {{- include "agent.env" . | nindent 4 }}
  {{- if eq .name "agent" }}
  ports:
    - {name: metrics, containerPort: 9090}
  {{- if eq $root.Values.mode "deployment" }}
  readinessProbe:  # opens once certificate, device and state folder are right
    tcpSocket: {port: metrics}
    periodSeconds: 5
  {{- end }}
  {{- end }}
  {{- if not .device }}
  resources:
    {{- include "agent.resources" $root | nindent 4 }}
  {{- end }}
  terminationMessagePolicy: FallbackToLogsOnError
  securityContext:
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL]}
  volumeMounts:
    - {name: state, mountPath: /state}
    - {name: data, mountPath: /data, readOnly: true}
    - {name: tls, mountPath: /tls, readOnly: true}
    - {name: tmp, mountPath: /tmp}
    - {name: shm, mountPath: /dev/shm}
{{- end -}}

{{- define "agent.podMetadata" -}}
labels:
  {{- include "agent.selector" . | nindent 2 }}
  app.kubernetes.io/component: agent
  app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
  {{- with .Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* A Pod's spec but its containers: under restricted Pod Security, without a token of the API. */}}
{{- define "agent.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  {{- with .Values.supplementalGroups }}
  supplementalGroups: {{ toJson . }}
  {{- end }}
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: state
    persistentVolumeClaim: {claimName: {{ include "agent.stateClaim" . }}}
  - name: data  # read-only here too, so that no kubelet gives the hospital's files to the Pod's group
    persistentVolumeClaim: {claimName: {{ include "agent.dataClaim" . }}, readOnly: true}
  - name: tls
    secret: {secretName: {{ include "agent.tlsSecret" . }}, defaultMode: 0440}
  - name: tmp
    emptyDir: {}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ .Values.sharedMemory }}}
{{- end -}}

{{/* What only Pods that train have. */}}
{{- define "agent.trainingPod" -}}
{{ include "agent.pod" . }}
{{- if and .Values.gpu.runtimeClassName (gt (int .Values.gpu.count) 0) }}
runtimeClassName: {{ .Values.gpu.runtimeClassName }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Of Jobs: a lost node does not count, and a wrong setting gets no better by trying again. */}}
{{- define "agent.podFailurePolicy" -}}
podFailurePolicy:
  rules:
    - action: Ignore
      onPodConditions: [{type: DisruptionTarget, status: "True"}]
    - action: FailJob
      onExitCodes: {operator: In, values: [2]}
{{- end -}}
