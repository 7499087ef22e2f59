{{- /* A Redis pod: (dict "root" $ "component" "cache" "spec" <values> "settings" <redis.conf> "secretKey" "cache-password" "claim" false). */}}
{{- define "pdserve.redisPod" -}}
{{- $root := .root }}
metadata:
  labels:
    {{- include "pdserve.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
  {{- with $root.Values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "pdserve.fullname" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: 30
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- include "pdserve.podSecurity" $root | nindent 4 }}
  containers:
    - name: redis
      image: {{ .spec.image | default (include "pdserve.image" $root) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      # By standard input, so that the password stands in no command line and no file.
      command: [/bin/sh, -c]
      args:
        - |
          exec {{ .spec.command }} - <<END
          requirepass $REDIS_PASSWORD
          {{- .settings | nindent 10 }}
          END
      env:
        - name: REDIS_PASSWORD
          valueFrom:
            secretKeyRef:
              name: {{ include "pdserve.secretName" $root }}
              key: {{ .secretKey }}
      ports:
        - {name: redis, containerPort: 6379}
      startupProbe:
        tcpSocket: {port: redis}
        periodSeconds: 2
        failureThreshold: 60
      livenessProbe:
        tcpSocket: {port: redis}
        periodSeconds: 10
        failureThreshold: 6
      readinessProbe:
        tcpSocket: {port: redis}
        periodSeconds: 5
      resources:
        {{- toYaml .spec.resources | nindent 8 }}
      securityContext:
        {{- include "pdserve.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        - name: data
          mountPath: /data
  {{- if not .claim }}
  volumes:
    - name: data
      emptyDir: {}
  {{- end }}
  {{- include "pdserve.scheduling" .spec | nindent 2 }}
{{- end }}

{{- define "pdserve.redisService" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "pdserve.fullname" .root }}-{{ .component }}
  labels:
    {{- include "pdserve.labels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
spec:
  type: ClusterIP
  selector:
    {{- include "pdserve.selector" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
  ports:
    - {name: redis, port: 6379, targetPort: redis, protocol: TCP}
{{- end }}
