{{/* What every object of a release is labelled with. */}}
{{- define "fedaccord.labels" -}}
app.kubernetes.io/name: fedaccord
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: {{ .Values.role }}
{{- if eq .Values.role "site" }}
fedaccord/site: {{ required "Name the site: --set site.name=cleveland" .Values.site.name | quote }}
{{- end }}
{{- end }}

{{/* The pod, whichever object makes it. Both roles run as user 10001, with nothing to write to but the kit
and /tmp, with no right of the kernel's and no access to the cluster. */}}
{{- define "fedaccord.pod" -}}
{{- $hex := printf "%04X" (int (ternary .Values.coordinator.port .Values.site.coordinator.port (eq .Values.role "coordinator"))) -}}
metadata:
  labels:
    {{- include "fedaccord.labels" . | nindent 4 }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: 60
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    # Only an empty volume gets its group: else each start would open the keys, which are 0600, to it.
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  containers:
    - name: {{ .Values.role }}
      image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      {{- if not .Values.run }}
      command: ["sleep", "infinity"]
      {{- else if eq .Values.role "coordinator" }}
      args: ["coordinator", "up", "/kit/accord.toml"]
      {{- else }}
      args: ["site", "join", "/kit"]
      {{- end }}
      env:
        - {name: HOME, value: /tmp}
        - {name: FEDACCORD_HOME, value: /kit/.fedaccord}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      {{- if and .Values.run (eq .Values.role "coordinator") }}
      ports:
        - {name: link, containerPort: {{ .Values.coordinator.port }}}
        {{- if .Values.coordinator.metrics.port }}
        - {name: metrics, containerPort: {{ .Values.coordinator.metrics.port }}}
        {{- end }}
      # They look whether the port (in hex) is listened on, and do not connect: a connection without a
      # certificate would stand in the audit log as a refused one.
      startupProbe:
        exec:
          command: [sh, -c, "cat /proc/net/tcp /proc/net/tcp6 | grep -Eq ':{{ $hex }} 0+:0000 0A '"]
        periodSeconds: 5
        failureThreshold: 60
      readinessProbe:
        exec:
          command: [sh, -c, "cat /proc/net/tcp /proc/net/tcp6 | grep -Eq ':{{ $hex }} 0+:0000 0A '"]
        periodSeconds: 10
      livenessProbe:
        exec:
          command: [sh, -c, "cat /proc/net/tcp /proc/net/tcp6 | grep -Eq ':{{ $hex }} 0+:0000 0A '"]
        periodSeconds: 20
        failureThreshold: 6
      {{- end }}
      {{- if and .Values.run (eq .Values.role "site") }}
      # Ready: connected to the coordinator's port. No liveness: a site that is cut off dials again by
      # itself, one that cannot go on ends and is started again, and one that trains must not be killed.
      readinessProbe:
        exec:
          command: [sh, -c, "cat /proc/net/tcp /proc/net/tcp6 | grep -Eq ':{{ $hex }} 01 '"]
        periodSeconds: 10
      {{- end }}
      volumeMounts:
        - {name: kit, mountPath: /kit}
        - {name: tmp, mountPath: /tmp}
        {{- if and (eq .Values.role "site") .Values.site.dataClaim }}
        - {name: data, mountPath: /data, readOnly: true}
        {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  volumes:
    - name: kit
      persistentVolumeClaim:
        claimName: {{ .Release.Name }}-kit
    - name: tmp
      emptyDir:
        sizeLimit: {{ .Values.temporary }}
    {{- if and (eq .Values.role "site") .Values.site.dataClaim }}
    - name: data
      persistentVolumeClaim:
        claimName: {{ .Values.site.dataClaim }}
        readOnly: true
    {{- end }}
{{- end }}
